//! Every path that guestd serves: who may call it, and what a call means for idleness.
//!
//! guestd takes its access rules and its holds from this table, hostd its proxy's block list and its own holds. A path that is not
//! here does not exist.

/// Who may call a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposure {
    /// SDKs, through hostd's data plane.
    Public,
    /// The host alone: guestd asks for the control credential, and hostd's data plane never forwards it.
    HostOnly,
}

/// What a call means for idleness (DESIGN.md section 4, rule 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Never use: whoever asks whether a sandbox lives does not keep it alive.
    Never,
    /// Use from start to end.
    Call,
    /// Its start is use; afterwards the process that it is about decides.
    Process,
    /// Use while bytes move.
    Transfer,
    /// Its start is use; afterwards each event that it delivers.
    Watch,
}

/// How a call proves who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    /// Anybody who reaches the listener.
    None,
    /// The access token, once one is set; until then, a caller on the same machine or on the host's link.
    AccessToken,
    /// The access token or a signature in the query.
    AccessTokenOrSignature,
    /// The control credential.
    Control,
    /// `/init` has rules of its own.
    Init,
}

#[derive(Clone, Copy, Debug)]
pub struct Route {
    pub path: &'static str,
    pub exposure: Exposure,
    pub usage: Usage,
    pub credential: Credential,
}

const fn public(path: &'static str, usage: Usage) -> Route {
    Route { path, exposure: Exposure::Public, usage, credential: Credential::AccessToken }
}

const fn host_only(path: &'static str) -> Route {
    Route { path, exposure: Exposure::HostOnly, usage: Usage::Never, credential: Credential::Control }
}

/// The table.
pub const ROUTES: &[Route] = &[
    Route { path: "/health", exposure: Exposure::Public, usage: Usage::Never, credential: Credential::None },
    public("/metrics", Usage::Never),
    public("/envs", Usage::Call),
    Route {
        path: "/files",
        exposure: Exposure::Public,
        usage: Usage::Transfer,
        credential: Credential::AccessTokenOrSignature,
    },
    public("/files/compose", Usage::Call),
    public("/process.Process/List", Usage::Call),
    public("/process.Process/Start", Usage::Process),
    public("/process.Process/Connect", Usage::Process),
    public("/process.Process/Update", Usage::Call),
    public("/process.Process/StreamInput", Usage::Transfer),
    public("/process.Process/SendInput", Usage::Call),
    public("/process.Process/SendSignal", Usage::Call),
    public("/process.Process/CloseStdin", Usage::Call),
    public("/filesystem.Filesystem/Stat", Usage::Call),
    public("/filesystem.Filesystem/MakeDir", Usage::Call),
    public("/filesystem.Filesystem/Move", Usage::Call),
    public("/filesystem.Filesystem/ListDir", Usage::Call),
    public("/filesystem.Filesystem/Remove", Usage::Call),
    public("/filesystem.Filesystem/WatchDir", Usage::Watch),
    public("/filesystem.Filesystem/CreateWatcher", Usage::Call),
    public("/filesystem.Filesystem/GetWatcherEvents", Usage::Call),
    public("/filesystem.Filesystem/RemoveWatcher", Usage::Call),
    Route { path: "/init", exposure: Exposure::HostOnly, usage: Usage::Never, credential: Credential::Init },
    host_only("/freeze"),
    host_only("/unfreeze"),
    host_only("/fsfreeze"),
    host_only("/fsthaw"),
    host_only("/collapse"),
    host_only("/upgrade"),
    host_only("/activity.v1.Activity/Watch"),
    host_only("/activity.v1.Activity/Get"),
    host_only("/activity.v1.Activity/PrepareRelease"),
    host_only("/activity.v1.Activity/CommitRelease"),
    host_only("/activity.v1.Activity/AbortRelease"),
    host_only("/activity.v1.Activity/Explain"),
    host_only("/activity.v1.Activity/Notify"),
    host_only("/logs.v1.Logs/Follow"),
];

/// The route of a path as it stands in the request line.
pub fn find(path: &str) -> Option<&'static Route> {
    ROUTES.iter().find(|route| route.path == path)
}

/// Whether the data plane must not forward this path. The path is cleaned first, so that no spelling of it slips through: percent
/// escapes, doubled slashes, `.` and `..`, and letter case.
pub fn is_host_only(path: &str) -> bool {
    let cleaned = clean(path);
    ROUTES
        .iter()
        .any(|route| route.exposure == Exposure::HostOnly && route.path.eq_ignore_ascii_case(&cleaned))
}

fn clean(path: &str) -> String {
    let mut decoded = path.to_owned();
    // An escaped escape is decoded too: whoever decodes twice behind us must not find a blocked path.
    for _ in 0..4 {
        let next = percent_decoded(&decoded);
        if next == decoded {
            break;
        }
        decoded = next;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in decoded.split(['/', '\\']) {
        match part.split(';').next().unwrap_or_default() {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, tail)) = rest.split_first() {
        let digit = |index: usize| tail.get(index).and_then(|b| char::from(*b).to_digit(16));
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                rest = &tail[2..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_spelling_of_a_control_path_passes_the_proxy() {
        for path in [
            "/init",
            "/init/",
            "//init",
            "/./init",
            "/x/../init",
            "/%69nit",
            "/%2569nit",
            "/INIT",
            "/init;x=1",
            "/files/../upgrade",
            "/activity.v1.Activity/Get",
            "/activity.v1.Activity//PrepareRelease",
            "/%2e/fsfreeze",
            "\\init",
        ] {
            assert!(is_host_only(path), "{path}");
        }
        for path in ["/files", "/health", "/initialise", "/process.Process/Start", "/", "", "/a/init"] {
            assert!(!is_host_only(path), "{path}");
        }
    }

    #[test]
    fn every_host_only_path_needs_a_credential() {
        for route in ROUTES.iter().filter(|route| route.exposure == Exposure::HostOnly) {
            assert!(matches!(route.credential, Credential::Control | Credential::Init), "{}", route.path);
        }
    }

    #[test]
    fn asking_whether_a_sandbox_lives_is_never_use() {
        for path in ["/health", "/metrics", "/init", "/activity.v1.Activity/Get"] {
            assert_eq!(find(path).map(|route| route.usage), Some(Usage::Never), "{path}");
        }
    }

    #[test]
    fn paths_are_unique() {
        for (index, route) in ROUTES.iter().enumerate() {
            assert!(ROUTES[index + 1..].iter().all(|other| other.path != route.path), "{}", route.path);
        }
    }
}
