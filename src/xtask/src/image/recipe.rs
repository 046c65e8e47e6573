//! What an image is made from: `rootfs/<template>/recipe.toml` and the scripts beside it.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// A template's recipe. `rootfs/README.md` explains the fields to whoever writes one.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub name: String,
    /// The distribution's release, as mmdebstrap knows it.
    pub suite: String,
    pub packages: Vec<String>,
    /// Paths that no package may install, and the exceptions from them (`dpkg`'s path-exclude and path-include).
    #[serde(default)]
    pub leave_out: Vec<String>,
    #[serde(default)]
    pub keep: Vec<String>,
    /// Scripts in the template's folder, run in this order on the finished tree, with its path as their argument.
    #[serde(default)]
    pub scripts: Vec<String>,
    /// No file of the image is newer than this many seconds since 1970, so that a second build gives the same bytes.
    pub source_date_epoch: u32,
    pub kernel: KernelRecipe,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelRecipe {
    /// A package that is a kernel or depends on exactly one.
    pub package: String,
    /// In the order in which they should be loaded; what they depend on is added.
    pub modules: Vec<String>,
}

/// A recipe together with its scripts' texts.
#[derive(Clone, Debug)]
pub struct Template {
    pub recipe: Recipe,
    pub scripts: Vec<String>,
    /// Everything that was read, for the cache's key.
    pub text: String,
}

impl Template {
    /// Reads a template from its folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let mut text = read("recipe.toml")?;
        let recipe: Recipe = toml::from_str(&text)
            .with_context(|| format!("{} is not a recipe", folder.join("recipe.toml").display()))?;
        let scripts = recipe.scripts.iter().map(|name| read(name)).collect::<Result<Vec<_>>>()?;
        for script in &scripts {
            text.push('\0');
            text.push_str(script);
        }
        Ok(Self { recipe, scripts, text })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_in_the_repository_can_be_read() {
        let rootfs = crate::workspace::root().join("rootfs");
        let mut templates = 0;
        for entry in std::fs::read_dir(rootfs).unwrap() {
            let folder = entry.unwrap().path();
            if folder.is_dir() {
                let template = Template::read(&folder).unwrap();
                assert_eq!(folder.file_name().unwrap().to_string_lossy(), template.recipe.name);
                templates += 1;
            }
        }
        assert!(templates > 0);
    }

    #[test]
    fn a_misspelt_field_is_an_error() {
        let text = "name='x'\nsuite='x'\npackages=[]\nsource_date_epoch=1\npackage=[]\n\
                    [kernel]\npackage='x'\nmodules=[]";
        assert!(toml::from_str::<Recipe>(text).unwrap_err().to_string().contains("package"));
    }
}
