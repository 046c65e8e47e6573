//! Paths as clients write them, against the rules that hold for each (contract: envd.md section 1.4).

use std::path::{Component, Path, PathBuf};

use arbitrary::Unstructured;
use guestd::identity::{User, clean, resolve_path};

const PIECES: [&str; 10] = ["/", "//", ".", "..", "~", "~/", "~root/", "a", "/a/../", "\0"];

pub fn run(data: &[u8]) {
    let _end_of_data = resolve(&mut Unstructured::new(data));
}

fn resolve(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let workdir = if input.arbitrary()? { Some(text(input)?) } else { None };
    let home = PathBuf::from(if input.arbitrary()? { "/home/user" } else { "" });
    let path = text(input)?;
    let user = User {
        name: "user".to_owned(),
        uid: 1000,
        gid: 1000,
        home,
        shell: PathBuf::new(),
        groups: Vec::new(),
    };
    if let Ok(resolved) = resolve_path(&path, &user, workdir.as_deref()) {
        let steps_up = resolved.components().any(|part| part == Component::ParentDir);
        assert!(resolved.is_absolute() && !steps_up, "{path:?} is {resolved:?}");
        assert_eq!(clean(&resolved), resolved, "{path:?}");
    }
    let cleaned = clean(Path::new(&path));
    assert_eq!(clean(&cleaned), cleaned, "{path:?}");
    let host_only = guestd_protocol::routes::is_host_only(&path);
    assert!(!host_only || guestd_protocol::routes::is_host_only(&format!("/{path}")), "{path:?}");
    Ok(())
}

fn text(input: &mut Unstructured<'_>) -> arbitrary::Result<String> {
    let mut text = String::new();
    for _ in 0..input.int_in_range(0..=8)? {
        match input.arbitrary()? {
            true => text.push_str(input.choose(&PIECES)?),
            false => text.push_str(input.arbitrary()?),
        }
    }
    Ok(text)
}
