//! Code cells.

use std::net::{Ipv4Addr, TcpStream};

use anyhow::Result;

use super::Bench;
use super::row::{Gate, Reading, Row};

pub const ROWS: &[Row] = &[Row {
    name: "code-cell",
    title: "code cell 1+1 on a warm kernel",
    promise: "<= 1.5 x the bare round trip",
    gate: Gate::Open,
    measure,
}];

/// Where cells are run (contract: envd.md section 7).
const CODE_PORT: u16 = 49999;

fn measure(bench: &Bench) -> Result<Reading> {
    let _agent = bench.agent()?;
    Ok(Reading::absent(match TcpStream::connect((Ipv4Addr::LOCALHOST, CODE_PORT)) {
        Ok(_) => "port 49999 answers, but this row does not know how to measure it",
        Err(_) => "not built yet: this agent has no /execute on port 49999",
    }))
}
