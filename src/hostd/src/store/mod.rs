//! The records on disk: one file, an embedded database. What is answered to a client is in it first (DESIGN.md section 4, rule 9).
//!
//! Values are JSON. Fields that a reader does not know are ignored, so that an older hostd reads what a newer one wrote; a field that is added
//! has to have a default, so that a newer one reads what an older one wrote.

mod record;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use record::{GuardId, Record, Stage, Tombstone};

const SANDBOXES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("sandboxes");
const TOMBSTONES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("tombstones");

const FILE: &str = "hostd.redb";

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("another hostd uses the data folder {}: stop it, or give this one another --data", .0.display())]
    InUse(PathBuf),
    #[error("cannot open {}: {source}", path.display())]
    Open { path: PathBuf, source: redb::DatabaseError },
    #[error("the records cannot be read or written: {0}")]
    Database(#[from] redb::Error),
    #[error("the record of {key} cannot be read: {source}")]
    Record { key: String, source: serde_json::Error },
    #[error("a store task was cancelled")]
    Cancelled,
}

/// The store. Calls run on blocking threads: a commit waits for the disk.
#[derive(Clone, Debug)]
pub struct Store {
    database: Arc<Database>,
}

impl Store {
    /// Opens the store of a data folder, or makes it.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has it open.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join(FILE);
        let database = Database::create(&path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(folder.to_owned()),
            source => StoreError::Open { path, source },
        })?;
        let store = Self { database: Arc::new(database) };
        let write = store.database.begin_write().map_err(redb::Error::from)?;
        write.open_table(SANDBOXES).map_err(redb::Error::from)?;
        write.open_table(TOMBSTONES).map_err(redb::Error::from)?;
        write.commit().map_err(redb::Error::from)?;
        Ok(store)
    }

    /// Writes a record; it is on disk when this returns.
    ///
    /// # Errors
    /// What the database said.
    pub async fn put(&self, record: Record) -> Result<(), StoreError> {
        self.write(move |write| {
            let mut table = write.open_table(SANDBOXES)?;
            table.insert(record.id.as_str(), encode(&record).as_slice())?;
            Ok(())
        })
        .await
    }

    /// Writes a record again, unless it was forgotten meanwhile.
    ///
    /// # Errors
    /// What the database said.
    pub async fn update(&self, record: Record) -> Result<(), StoreError> {
        self.write(move |write| {
            let mut table = write.open_table(SANDBOXES)?;
            if table.get(record.id.as_str())?.is_some() {
                table.insert(record.id.as_str(), encode(&record).as_slice())?;
            }
            Ok(())
        })
        .await
    }

    /// Forgets a sandbox whose machine is gone.
    ///
    /// # Errors
    /// What the database said.
    pub async fn forget(&self, id: String) -> Result<(), StoreError> {
        self.write(move |write| {
            write.open_table(SANDBOXES)?.remove(id.as_str())?;
            Ok(())
        })
        .await
    }

    /// Writes a sandbox's tombstone. Its record stays until [`Store::forget`]: it says which machine has to be gone first.
    ///
    /// # Errors
    /// What the database said.
    pub async fn bury(&self, tombstone: Tombstone) -> Result<(), StoreError> {
        self.write(move |write| {
            write.open_table(TOMBSTONES)?.insert(tombstone.id.as_str(), encode(&tombstone).as_slice())?;
            Ok(())
        })
        .await
    }

    /// Drops tombstones that ended before a wall time.
    ///
    /// # Errors
    /// What the database said.
    pub async fn expire(&self, ended_before_ms: i64) -> Result<(), StoreError> {
        self.write(move |write| {
            let mut table = write.open_table(TOMBSTONES)?;
            table.retain(|_, value| {
                serde_json::from_slice::<Tombstone>(value)
                    .is_ok_and(|tombstone| tombstone.ended_wall_ms >= ended_before_ms)
            })?;
            Ok(())
        })
        .await
    }

    /// All records.
    ///
    /// # Errors
    /// What the database said, or the record that cannot be read.
    pub fn records(&self) -> Result<Vec<Record>, StoreError> {
        self.rows(SANDBOXES)?.into_iter().collect()
    }

    /// All tombstones that can be read. One that cannot (another version wrote it) is left to expire: history must not keep a supervisor
    /// from starting.
    ///
    /// # Errors
    /// What the database said.
    pub fn tombstones(&self) -> Result<Vec<Tombstone>, StoreError> {
        let mut readable = Vec::new();
        for row in self.rows(TOMBSTONES)? {
            match row {
                Ok(tombstone) => readable.push(tombstone),
                Err(error) => tracing::warn!(%error, "a tombstone is skipped"),
            }
        }
        Ok(readable)
    }

    fn rows<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'static, &str, &[u8]>,
    ) -> Result<Vec<Result<T, StoreError>>, StoreError> {
        let read = self.database.begin_read().map_err(redb::Error::from)?;
        let table = read.open_table(table).map_err(redb::Error::from)?;
        let mut all = Vec::new();
        for row in table.iter().map_err(redb::Error::from)? {
            let (key, value) = row.map_err(redb::Error::from)?;
            let parsed = serde_json::from_slice(value.value())
                .map_err(|source| StoreError::Record { key: key.value().to_owned(), source });
            all.push(parsed);
        }
        Ok(all)
    }

    async fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error> + Send + 'static,
    ) -> Result<(), StoreError> {
        let database = Arc::clone(&self.database);
        let task = tokio::task::spawn_blocking(move || -> Result<(), redb::Error> {
            let write = database.begin_write()?;
            change(&write)?;
            write.commit()?;
            Ok(())
        });
        task.await.map_err(|_| StoreError::Cancelled)?.map_err(StoreError::Database)
    }
}

/// Serialising these plain structs cannot fail: their maps have string keys.
fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_supervisor_on_the_same_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _first = Store::open(folder.path()).unwrap();
        let refused = Store::open(folder.path()).unwrap_err();
        assert!(matches!(refused, StoreError::InUse(_)), "{refused}");
    }

    #[tokio::test]
    async fn a_record_becomes_a_tombstone_and_the_tombstone_expires() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.put(Record::example("i1")).await.unwrap();
        assert_eq!(store.records().unwrap().len(), 1);
        store.bury(Tombstone::example("i1", 1_000)).await.unwrap();
        assert_eq!(store.records().unwrap().len(), 1, "its machine may still have to be ended");
        store.forget("i1".to_owned()).await.unwrap();
        store.update(Record::example("i1")).await.unwrap();
        assert!(store.records().unwrap().is_empty());
        store.expire(1_000).await.unwrap();
        assert_eq!(store.tombstones().unwrap().len(), 1);
        store.expire(1_001).await.unwrap();
        assert!(store.tombstones().unwrap().is_empty());
    }
}
