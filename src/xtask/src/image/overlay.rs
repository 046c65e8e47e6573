//! What a template brings besides the distribution's packages: files of its own, and Python wheels from PyPI.
//!
//! Both are laid out in a folder as they are to lie in the image, and packed into an archive for mmdebstrap. The wheels
//! are fetched by this machine's pip, which checks their hashes and runs none of their code.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::recipe::{Copied, Template, Wheels, plain_files};
use crate::{steps, workspace};

/// Packs what is laid over the packages into `archive`. `scratch` is a folder that is not there yet, and is removed
/// again. Returns false, and makes nothing, when the template brings nothing.
pub fn pack(template: &Template, scratch: &Path, archive: &Path) -> Result<bool> {
    if template.files.is_empty() && template.wheels.is_empty() {
        return Ok(false);
    }
    for copied in &template.files {
        copy(copied, scratch)?;
    }
    for wheels in &template.wheels {
        install(wheels, scratch)?;
    }
    // Nothing of this machine: neither its users, nor its umask, nor the time.
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.args(["--mode=u=rwX,go=rX", &format!("--mtime=@{}", template.recipe.source_date_epoch)]);
    tar.arg("--file").arg(archive).arg("--directory").arg(scratch).arg(".");
    steps::quietly(&mut tar)?;
    std::fs::remove_dir_all(scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    Ok(true)
}

fn copy(copied: &Copied, root: &Path) -> Result<()> {
    let to = inside(root, &copied.to);
    for file in plain_files(&copied.from)? {
        let target = match file.strip_prefix(&copied.from) {
            Ok(name) if !name.as_os_str().is_empty() => to.join(name),
            _ => to.clone(),
        };
        let cannot = || format!("cannot copy {} to {}", file.display(), target.display());
        std::fs::create_dir_all(target.parent().unwrap_or(root)).with_context(cannot)?;
        std::fs::copy(&file, &target).with_context(cannot)?;
    }
    Ok(())
}

/// Installs exactly the listed wheels where the image's Python looks for them, and their programs into /usr/local/bin.
fn install(wheels: &Wheels, root: &Path) -> Result<()> {
    let version = &wheels.python.version;
    let packages = root.join(format!("usr/local/lib/python{version}/dist-packages"));
    // pip goes by what is installed beside it, so it gets an environment with nothing.
    let environment = workspace::target().join("image-venv");
    let python = environment.join("bin/python");
    if !workspace::is_executable(&environment.join("bin/pip")) {
        steps::quietly(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment))?;
    }
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]);
    pip.args(["--require-hashes", "--no-deps", "--only-binary=:all:", "--no-compile"]);
    pip.args(["--implementation=cp", "--python-version", version]);
    pip.args(wheels.python.platforms.iter().map(|platform| format!("--platform={platform}")));
    pip.arg("--target").arg(&packages).arg("--requirement").arg(&wheels.list);
    steps::quietly(&mut pip)?;

    let (from, to) = (packages.join("bin"), root.join("usr/local/bin"));
    if !from.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
    for program in plain_files(&from)? {
        let target = to.join(program.file_name().unwrap_or_default());
        let cannot = || format!("cannot make {}", target.display());
        std::fs::rename(&program, &target).with_context(cannot)?;
        let contents = std::fs::read(&target).with_context(cannot)?;
        if let Some(contents) = with_the_python_of_the_image(&contents) {
            std::fs::write(&target, contents).with_context(cannot)?;
        }
    }
    std::fs::remove_dir_all(&from).with_context(|| format!("cannot remove {}", from.display()))
}

/// pip begins the scripts that it makes with the path of the Python that it runs on, or with three lines of shell where
/// that path is long. None for what is no such script.
fn with_the_python_of_the_image(program: &[u8]) -> Option<Vec<u8>> {
    if !program.starts_with(b"#!") {
        return None;
    }
    let header = if program.starts_with(b"#!/bin/sh\n'''exec'") { 3 } else { 1 };
    let body = program.splitn(header + 1, |byte| *byte == b'\n').nth(header)?;
    Some([b"#!/usr/bin/python3\n", body].concat())
}

/// Where a path of the image is while its root is a folder here.
fn inside(root: &Path, path: &Path) -> std::path::PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(folder: &Path, recipe: &str) -> Template {
        let of = folder.join("t");
        std::fs::create_dir_all(of.join("files/module/deep")).unwrap();
        std::fs::write(of.join("files/module/deep/a.py"), "a").unwrap();
        std::fs::write(of.join("files/one.toml"), "b").unwrap();
        let rest = "name='t'\nsuite='s'\nsource_date_epoch=7\n[kernel]\npackage='k'\nmodules=[]\n";
        std::fs::write(of.join("recipe.toml"), format!("{rest}{recipe}")).unwrap();
        Template::read(&of).unwrap()
    }

    #[test]
    fn files_lie_where_the_recipe_says_with_nothing_of_this_machine() {
        let folder = tempfile::tempdir().unwrap();
        let recipe = "[files]\nmodule='/usr/lib/m'\n'one.toml'='/etc/two.toml'";
        let archive = folder.path().join("overlay.tar");
        let scratch = folder.path().join("scratch");
        assert!(pack(&template(folder.path(), recipe), &scratch, &archive).unwrap());
        assert!(!scratch.exists());
        let list = steps::output(Command::new("tar").args(["-tvf"]).arg(&archive).env("TZ", "UTC")).unwrap();
        let line = |name: &str| list.lines().find(|line| line.ends_with(name)).unwrap().to_owned();
        assert!(line("./usr/lib/m/deep/a.py").starts_with("-rw-r--r-- 0/0"), "{list}");
        assert!(line("./etc/two.toml").contains("1970-01-01"), "{list}");
    }

    #[test]
    fn a_script_of_pip_runs_on_the_python_of_the_image() {
        let expected = b"#!/usr/bin/python3\nimport x\nx.main()\n".to_vec();
        let short = b"#!/a/long/path/bin/python\nimport x\nx.main()\n";
        assert_eq!(with_the_python_of_the_image(short).unwrap(), expected);
        let long = b"#!/bin/sh\n'''exec' '/a b/python' \"$0\" \"$@\"\n' '''\nimport x\nx.main()\n";
        assert_eq!(with_the_python_of_the_image(long).unwrap(), expected);
        assert_eq!(with_the_python_of_the_image(b"\x7fELF"), None);
    }

    #[test]
    fn a_template_that_brings_nothing_makes_no_archive() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("overlay.tar");
        assert!(!pack(&template(folder.path(), ""), &folder.path().join("scratch"), &archive).unwrap());
        assert!(!archive.exists());
    }
}
