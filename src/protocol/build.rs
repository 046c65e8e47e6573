//! Generates the wire types from `proto/`, without protoc.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["process.proto", "filesystem.proto", "activity.proto", "logs.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let path = PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(&path, protox::prost::Message::encode_to_vec(&descriptors))?;
    connectrpc_build::Config::new()
        .descriptor_set(&path)
        .files(&files)
        .gate_client_feature(true)
        .client_feature_name("client")
        .include_file("wire.rs")
        // It would watch the descriptors, which this has just written: everything was built anew each time.
        .emit_rerun_directives(false)
        .compile()?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
