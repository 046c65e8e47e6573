//! What goes over the wire between SDKs, hostd and guestd. No I/O.
//!
//! - [`wire`]: the protobuf services `process.Process`, `filesystem.Filesystem`, `activity.v1.Activity` and `logs.v1.Logs`, generated from `proto/`.
//! - [`routes`]: every path that guestd serves, who may call it, and what it means for idleness: one table for both sides.
//! - [`init`]: the body of `POST /init`.
//! - [`link`]: how a byte stream from host to guest begins.
//! - [`signature`]: signed file URLs.
//! - [`errors`]: the JSON error bodies.

pub mod errors;
pub mod files_query;
pub mod init;
pub mod link;
pub mod routes;
pub mod signature;

/// The generated messages and services.
#[allow(missing_debug_implementations, clippy::all)]
pub mod wire {
    include!(concat!(env!("OUT_DIR"), "/wire.rs"));
}

/// The envd port (contract: envd.md section 0).
pub const ENVD_PORT: u16 = 49983;

/// The code interpreter's port.
pub const CODE_PORT: u16 = 49999;

/// The vsock port of the agent's one listener.
pub const VSOCK_PORT: u32 = 49983;

/// The host's vsock port that an agent dials once, when it listens. Dialling a guest before that can wedge vhost-device-vsock for good.
pub const HELLO_PORT: u32 = 49984;

/// The name of the virtio-serial port that carries the link where there is no vsock.
pub const SERIAL_PORT_NAME: &str = "guestd.link";

/// The credential of the host: without it control calls are refused on every listener. The first `/init` that carries it sets it.
pub const CONTROL_HEADER: &str = "x-guestd-control";

/// The credential of an SDK.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";

/// The envd version that SDKs gate their features on (contract: envd.md section 8.1): the newest whose SDK-visible features are all here.
pub const ENVD_VERSION: &str = "0.6.13";

/// How many header lines a request may have, at the host's door as at the agent's. The 4096 bytes of metadata that an upload may carry
/// (contract: envd.md section 4.6) come in 1365 lines when each has three, and there is room for the other headers. hyper makes a table of
/// 64 bytes a line for each request: all of it has to stay below what the C library gives back at once (128 KiB, M_TRIM_THRESHOLD of
/// mallopt(3)), or each request asks the kernel for memory.
pub const HEADER_LINES: usize = 1536;

/// How long all header lines of a request may be on HTTP/2, in bytes, 32 for each line included (RFC 9113 section 6.5.2); those of three
/// bytes of metadata have 46.
pub const HEADER_BYTES: u32 = 128 * 1024;

/// The largest message of a call to the agent, in bytes. envd has no limit; a machine that runs out of memory has one.
pub const MESSAGE_LIMIT: usize = 64 * 1024 * 1024;
