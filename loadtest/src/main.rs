//! Load generator for Hubcast: what a gateway does on *this* machine, next to what the kernel alone costs.

#![allow(clippy::print_stdout, reason = "a report on the terminal is what this program is for")]

mod cpu;
mod fanout;
mod floor;
mod wire;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Load generator for Hubcast")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Connect subscribers, publish, and report deliveries and latency
    Fanout(fanout::Options),
    /// Serve the same wire with a bare send() loop, to compare with
    Floor(floor::Options),
}

fn main() -> anyhow::Result<()> {
    match Options::parse().command {
        Command::Fanout(options) => fanout::run(&options),
        Command::Floor(options) => floor::run(&options),
    }
}
