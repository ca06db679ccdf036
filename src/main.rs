//! The gateway's timeline: configuration, log, start, signal, drain.
//!
//! The allocator is the system's: mimalloc and jemalloc made no difference to a delivery's CPU that could
//! be told from noise, and 10,000 connections took 23 MB with it and jemalloc, 36 MB with mimalloc.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use hubcast::config::Config;
use hubcast::gateway::{self, Gateway};
use hubcast::token::{self, Wanted};
use hubcast::variables::VARIABLES;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// A WebSocket broadcast gateway: publish once, every subscriber has it.
#[derive(Parser)]
#[command(version, after_help = environment_help(), args_conflicts_with_subcommands = true)]
struct Options {
    #[command(subcommand)]
    command: Option<Action>,
    /// Print the effective configuration, secrets masked, and end
    #[arg(long)]
    print_config: bool,
    /// Print the script by which backends publish to channels with history at Redis, and end
    #[arg(long)]
    print_publish_script: bool,
    /// Serve /echo for WebSocket conformance tests
    #[arg(long)]
    echo: bool,
}

#[derive(Subcommand)]
enum Action {
    /// Mint a token for development, signed with HUBCAST_JWT_SECRET; or explain one
    #[command(args_conflicts_with_subcommands = true)]
    Token {
        #[command(subcommand)]
        explain: Option<Explain>,
        #[command(flatten)]
        wanted: TokenOptions,
    },
}

#[derive(Args)]
struct TokenOptions {
    /// Whose it is (`sub`)
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// By which it can be revoked (`jti`)
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// May subscribe to a channel, or to all of a pattern such as chat:*; may be repeated, as the next ones
    #[arg(long, value_name = "PATTERN")]
    subscribe: Vec<String>,
    /// May publish there
    #[arg(long, value_name = "PATTERN")]
    publish: Vec<String>,
    /// May ask who is there
    #[arg(long, value_name = "PATTERN")]
    presence: Vec<String>,
    /// May ask what was published there
    #[arg(long, value_name = "PATTERN")]
    history: Vec<String>,
    /// How long it is good for
    #[arg(long, value_name = "DURATION", default_value = "1h")]
    expires_in: humantime::Duration,
}

#[derive(Subcommand)]
enum Explain {
    /// Say whether the gateway would take a token, and what it allows, on these channels or at all
    Explain {
        /// The token
        token: String,
        /// Channels
        channels: Vec<String>,
    },
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.print_publish_script {
        say(hubcast::history_redis::publish_script().trim());
        return ExitCode::SUCCESS;
    }
    let mut config = match Config::from_process_env() {
        Ok(config) => config,
        Err(error) => return refuse(&error.to_string()),
    };
    config.echo = options.echo;
    if let Some(Action::Token { explain, wanted }) = options.command {
        return token_command(&config, explain, wanted);
    }
    if options.print_config {
        say(config.print(gateway::connections_max(config.connections_max)).trim_end());
        return ExitCode::SUCCESS;
    }
    start_log(&config);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(config.worker_threads).enable_all().build();
    match runtime.context("cannot start the runtime").and_then(|runtime| runtime.block_on(run(config))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => refuse(&format!("{error:#}")),
    }
}

/// `hubcast token`
fn token_command(config: &Config, explain: Option<Explain>, wanted: TokenOptions) -> ExitCode {
    let outcome = match explain {
        Some(Explain::Explain { token, channels }) => {
            match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime.block_on(token::explain(config, &token, &channels)),
                Err(error) => Err(error.to_string()),
            }
        }
        None => {
            let TokenOptions { user, id, subscribe, publish, presence, history, expires_in } = wanted;
            let wanted = Wanted { user, id, subscribe, publish, presence, history };
            token::mint(config, &wanted, expires_in.as_secs())
        }
    };
    match outcome {
        Ok(text) => {
            say(text.trim_end());
            ExitCode::SUCCESS
        }
        Err(error) => refuse(&format!("token: {error}")),
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let drain_time = config.drain_time;
    for note in &config.notes {
        info!("{note}");
    }
    let scheme = if config.edge.tls.is_some() { "wss" } else { "ws" };
    let mut gateway = Gateway::start(config)?;
    let (public, internal) = (gateway.addr(), gateway.internal_addr());
    say(&format!(
        "hubcast {} is ready\n  clients connect to  {scheme}://{public}/ws?channels=news\n  backends publish with\n    curl -d '{{\"hello\":\"world\"}}' http://{internal}/api/publish/news",
        env!("CARGO_PKG_VERSION")
    ));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = gateway.failed() => anyhow::bail!("a part of the gateway panicked"),
    }
    info!(?drain_time, "draining; a second signal ends at once");
    tokio::select! {
        drained = gateway.drain() => {
            say(&format!(
                "hubcast drained: {} closed, {} flushed, {} cut off",
                drained.closed, drained.flushed, drained.cut_off
            ));
            Ok(())
        }
        _ = terminate.recv() => anyhow::bail!("ended at once by a second signal"),
        _ = interrupt.recv() => anyhow::bail!("ended at once by a second signal"),
    }
}

fn start_log(config: &Config) {
    let is_terminal = std::io::stderr().is_terminal();
    // The cluster client warns of a node that is down once a second; that is said once already.
    let filter = format!("redis=error,{}", config.log);
    let builder =
        tracing_subscriber::fmt().with_env_filter(&filter).with_writer(std::io::stderr).with_ansi(is_terminal);
    if config.log_json { builder.json().init() } else { builder.init() }
}

fn environment_help() -> String {
    let mut help = "Environment (defaults in brackets):\n".to_owned();
    for variable in VARIABLES {
        help += &format!("  {} [{}]\n      {}\n", variable.name, variable.default, variable.help);
    }
    help
}

fn refuse(message: &str) -> ExitCode {
    #[expect(clippy::print_stderr, reason = "one line for whoever started it, also before there is a log")]
    {
        eprintln!("hubcast: {message}");
    }
    ExitCode::FAILURE
}

fn say(text: &str) {
    #[expect(clippy::print_stdout, reason = "what the operator should see, apart from the log")]
    {
        println!("{text}");
    }
}
