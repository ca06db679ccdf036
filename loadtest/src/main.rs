//! Load generator for Hubcast: what a gateway does on *this* machine, next to what the kernel alone costs.
//!
//! One event loop ([`world`]) carries subscribers ([`swarm`]), publishers ([`publisher`]) and, for some
//! commands, a companion that disturbs them. Each command is one file; [`verify`] is about promises, not speed, and has
//! tasks instead.

#![allow(clippy::print_stdout, reason = "a report on the terminal is what this program is for")]

mod alarm;
mod axis;
mod capacity;
mod chart;
mod children;
mod churn;
mod fanout;
mod flights;
mod flood;
mod floor;
mod html;
mod idle;
mod machine;
mod number;
mod options;
mod panels;
mod publisher;
mod report;
mod slow;
mod storm;
mod stream;
mod summary;
mod swarm;
mod tally;
mod verify;
mod wire;
mod world;

use std::process::ExitCode;

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
    /// Connect and wait: memory and CPU of idle connections, connect rate
    Idle(idle::Options),
    /// Drop all connections at once and let them come back
    Storm(storm::Options),
    /// Subscribe and unsubscribe under load
    Churn(churn::Options),
    /// Let some subscribers stall or trickle
    Slow(slow::Options),
    /// Let somebody send far too much
    Flood(flood::Options),
    /// Find the highest rate that holds
    Capacity(capacity::Options),
    /// Prove that nothing is lost in silence, repeated or out of order
    Verify(verify::Options),
    /// Serve the same wire with a bare send() loop, to compare with
    Floor(floor::Options),
    #[command(name = children::SUBCOMMAND, hide = true)]
    SubscriberProcess,
}

fn main() -> anyhow::Result<ExitCode> {
    match Options::parse().command {
        Command::Fanout(options) => fanout::run(&options),
        Command::Idle(options) => idle::run(&options),
        Command::Storm(options) => storm::run(&options),
        Command::Churn(options) => churn::run(&options),
        Command::Slow(options) => slow::run(&options),
        Command::Flood(options) => flood::run(&options),
        Command::Capacity(options) => capacity::run(&options),
        Command::Verify(options) => return Ok(verify::run(&options)),
        Command::Floor(options) => floor::run(&options),
        Command::SubscriberProcess => children::run(),
    }?;
    Ok(ExitCode::SUCCESS)
}
