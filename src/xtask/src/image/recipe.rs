//! What an image is made from: `rootfs/<template>/recipe.toml` and the scripts and files beside it.
//!
//! A recipe that extends another has the other's lists as well as its own; whatever else it does not say is as there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::store;

/// The file that makes a folder a template.
const RECIPE: &str = "recipe.toml";

/// The folder, in a template's, of what is copied into the image.
const FILES: &str = "files";

/// A template's `recipe.toml`. `rootfs/README.md` explains the fields to whoever writes one.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecipeFile {
    name: String,
    extends: Option<String>,
    suite: Option<String>,
    #[serde(default)]
    packages: Vec<String>,
    #[serde(default)]
    leave_out: Vec<String>,
    #[serde(default)]
    keep: Vec<String>,
    #[serde(default)]
    scripts: Vec<String>,
    #[serde(default)]
    last: Vec<String>,
    #[serde(default)]
    files: BTreeMap<String, PathBuf>,
    python: Option<PythonRecipe>,
    source_date_epoch: Option<u32>,
    kernel: Option<KernelRecipe>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelRecipe {
    /// A package that is a kernel or depends on exactly one.
    pub package: String,
    /// In the order in which they should be loaded; what they depend on is added.
    pub modules: Vec<String>,
}

/// Python packages that the distribution does not have.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PythonRecipe {
    /// A file in pip's own form, with the hash of each wheel. Nothing that is not named there is installed.
    wheels: String,
    /// The suite's Python, as in `3.11`.
    pub version: String,
    /// Which wheels fit the image, as pip calls it.
    pub platforms: Vec<String>,
}

/// What is known about an image once all recipes are read, those that it extends included.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub name: String,
    /// The distribution's release, as mmdebstrap knows it.
    pub suite: String,
    pub packages: Vec<String>,
    /// Paths that no package may install, and the exceptions from them (`dpkg`'s path-exclude and path-include).
    pub leave_out: Vec<String>,
    pub keep: Vec<String>,
    /// No file of the image is newer than this many seconds since 1970, so that a second build gives the same bytes.
    pub source_date_epoch: u32,
    pub kernel: KernelRecipe,
}

/// A file or folder of a template and its place in the image.
#[derive(Clone, Debug)]
pub struct Copied {
    pub from: PathBuf,
    /// An absolute path in the image.
    pub to: PathBuf,
}

/// Wheels to install.
#[derive(Clone, Debug)]
pub struct Wheels {
    pub list: PathBuf,
    pub python: PythonRecipe,
}

/// A recipe together with what stands beside it.
#[derive(Clone, Debug)]
pub struct Template {
    pub recipe: Recipe,
    /// The texts of the scripts, in the order in which they run on the finished tree, with its path as their argument.
    pub scripts: Vec<String>,
    pub files: Vec<Copied>,
    pub wheels: Vec<Wheels>,
    /// Everything that was read, for the cache's key.
    pub text: String,
}

/// The names of the recipes in a folder, in order.
pub fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let is_recipe = |entry: &std::fs::DirEntry| entry.path().join(RECIPE).is_file();
    let mut names: Vec<_> = entries
        .flatten()
        .filter(is_recipe)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

impl Template {
    /// Reads a template from its folder, and those that it extends from the folders beside it.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut text = String::new();
        let mut layers: Vec<(PathBuf, RecipeFile)> = Vec::new();
        let mut next = Some(folder.to_owned());
        while let Some(folder) = next {
            let file: RecipeFile = toml::from_str(&note(&mut text, &folder.join(RECIPE))?)
                .with_context(|| format!("{} is not a recipe", folder.join(RECIPE).display()))?;
            ensure!(
                layers.iter().all(|(_, seen)| seen.name != file.name),
                "{} extends itself",
                folder.join(RECIPE).display()
            );
            next = file.extends.as_ref().map(|name| folder.with_file_name(name));
            layers.push((folder, file));
        }
        Self::merge(&layers, text)
    }

    /// The layers come with the most particular one first.
    fn merge(layers: &[(PathBuf, RecipeFile)], mut text: String) -> Result<Self> {
        let mut scripts = Vec::new();
        let mut files = Vec::new();
        let mut wheels = Vec::new();
        for (folder, layer) in layers.iter().rev() {
            for name in &layer.scripts {
                scripts.push(note(&mut text, &folder.join(name))?);
            }
            for (name, to) in &layer.files {
                ensure!(to.is_absolute(), "files.{name:?} of `{}` is no absolute path", layer.name);
                let from = folder.join(FILES).join(name);
                note_all(&mut text, &from)?;
                files.push(Copied { from, to: to.clone() });
            }
            if let Some(python) = &layer.python {
                let list = folder.join(&python.wheels);
                note(&mut text, &list)?;
                wheels.push(Wheels { list, python: python.clone() });
            }
        }
        // What tidies up does it for all layers.
        for (folder, layer) in layers.iter().rev() {
            for name in &layer.last {
                scripts.push(note(&mut text, &folder.join(name))?);
            }
        }
        let list = |of: fn(&RecipeFile) -> &Vec<String>| -> Vec<String> {
            layers.iter().rev().flat_map(|(_, layer)| of(layer)).cloned().collect()
        };
        fn first<T: Clone>(
            layers: &[(PathBuf, RecipeFile)],
            field: &str,
            of: fn(&RecipeFile) -> &Option<T>,
        ) -> Result<T> {
            let found = layers.iter().find_map(|(_, layer)| of(layer).clone());
            found.with_context(|| format!("the recipe of `{}` has no `{field}`", layers[0].1.name))
        }
        let recipe = Recipe {
            name: layers[0].1.name.clone(),
            suite: first(layers, "suite", |layer| &layer.suite)?,
            packages: list(|layer| &layer.packages),
            leave_out: list(|layer| &layer.leave_out),
            keep: list(|layer| &layer.keep),
            source_date_epoch: first(layers, "source_date_epoch", |layer| &layer.source_date_epoch)?,
            kernel: first(layers, "kernel", |layer| &layer.kernel)?,
        };
        Ok(Self { recipe, scripts, files, wheels, text })
    }
}

/// Reads a file and adds it to the cache's key.
fn note(text: &mut String, path: &Path) -> Result<String> {
    let contents =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.push('\0');
    text.push_str(&contents);
    Ok(contents)
}

/// Adds the names and digests of a file, or of all files of a folder, to the cache's key.
fn note_all(text: &mut String, path: &Path) -> Result<()> {
    for file in plain_files(path)? {
        let name = file.strip_prefix(path).unwrap_or(&file).display();
        text.push_str(&format!("\0{name}\0{}", store::digest_file(&file)?));
    }
    Ok(())
}

/// The files of a template's folder, sorted; what Python leaves beside its sources when it runs them is none of it.
pub fn plain_files(path: &Path) -> Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read {}", path.display());
    if !std::fs::metadata(path).with_context(cannot)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        if entry.file_name() != "__pycache__" {
            files.extend(plain_files(&entry.path())?);
        }
    }
    files.sort();
    Ok(files)
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
        let error = toml::from_str::<RecipeFile>("name='x'\npackage=[]").unwrap_err().to_string();
        assert!(error.contains("package"), "{error}");
    }

    /// A name, a recipe, and files by their path in the template's folder.
    type Example<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

    fn templates(recipes: &[Example<'_>]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, recipe, files) in recipes {
            let of = folder.path().join(name);
            for (path, text) in files.iter().chain(&[("recipe.toml", *recipe)]) {
                std::fs::create_dir_all(of.join(path).parent().unwrap()).unwrap();
                std::fs::write(of.join(path), text).unwrap();
            }
        }
        folder
    }

    const BASE: &str = "name='base'\nsuite='s'\npackages=['a']\nscripts=['users.sh']\nlast=['tidy.sh']\nsource_date_epoch=1\n\
                        [kernel]\npackage='k'\nmodules=['m']";

    #[test]
    fn a_template_adds_to_the_one_that_it_extends_and_is_tidied_up_after_both() {
        let more = "name='more'\nextends='base'\npackages=['b']\nscripts=['own.sh']\n[files]\nx='/y'";
        let recipes = templates(&[
            ("base", BASE, &[("users.sh", "users"), ("tidy.sh", "tidy")]),
            ("more", more, &[("own.sh", "own"), ("files/x/f", "1")]),
        ]);
        let template = Template::read(&recipes.path().join("more")).unwrap();
        assert_eq!(template.recipe.name, "more");
        assert_eq!(template.recipe.packages, ["a", "b"]);
        assert_eq!(template.recipe.kernel.modules, ["m"]);
        assert_eq!(template.scripts, ["users", "own", "tidy"]);
        assert_eq!(template.files[0].to, Path::new("/y"));
    }

    #[test]
    fn a_changed_file_changes_the_key_and_what_python_left_does_not() {
        let more = "name='more'\nextends='base'\n[files]\nx='/y'";
        let recipes = templates(&[
            ("base", BASE, &[("users.sh", "u"), ("tidy.sh", "t")]),
            ("more", more, &[("files/x/f", "1")]),
        ]);
        let folder = recipes.path().join("more");
        let read = || Template::read(&folder).unwrap().text;
        let before = read();
        std::fs::create_dir(folder.join("files/x/__pycache__")).unwrap();
        std::fs::write(folder.join("files/x/__pycache__/f.pyc"), "1").unwrap();
        assert_eq!(before, read());
        std::fs::write(folder.join("files/x/f"), "2").unwrap();
        assert_ne!(before, read());
    }

    #[test]
    fn a_circle_of_templates_is_an_error_and_so_is_a_field_that_none_of_them_has() {
        let circle = templates(&[("a", "name='a'\nextends='b'", &[]), ("b", "name='b'\nextends='a'", &[])]);
        let error = Template::read(&circle.path().join("a")).unwrap_err().to_string();
        assert!(error.contains("extends itself"), "{error}");
        let bare = templates(&[("a", "name='a'", &[])]);
        let error = Template::read(&bare.path().join("a")).unwrap_err().to_string();
        assert!(error.contains("`suite`"), "{error}");
    }
}
