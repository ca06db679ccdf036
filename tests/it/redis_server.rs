//! A real `redis-server` that ends with the test.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use crate::harness::{Port, Process, eventually, soon};

/// A real `redis-server` on a free port.
pub struct Redis {
    port: Port,
    /// What its own commands log in with, as in a URL: nothing or `user:password@`.
    credentials: String,
    arguments: Vec<String>,
    process: Option<Process>,
}

impl Redis {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        let mut redis = Self::reserve();
        redis.restart().await;
        redis
    }

    /// A port without a server, for now.
    pub fn reserve() -> Self {
        Self::reserve_with("", &[])
    }

    /// As [`Redis::reserve`], for a server with more arguments.
    pub fn reserve_with(credentials: &str, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        Self { port: Port::claim(), credentials: credentials.to_owned(), arguments, process: None }
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    pub fn url(&self) -> String {
        format!("redis://{}{}/", self.credentials, self.addr())
    }

    /// Starts the server on the same port, empty.
    pub async fn restart(&mut self) {
        self.restart_with(&[]).await;
    }

    /// As [`Redis::restart`], with more arguments for this time.
    pub async fn restart_with(&mut self, arguments: &[&str]) {
        let child = Command::new("redis-server")
            .args([
                "--port",
                &self.addr().port().to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
            ])
            .args(["--dir", &std::env::temp_dir().to_string_lossy()])
            .args(&self.arguments)
            .args(arguments)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed (.ci/run installs it)");
        self.process = Some(Process(child));
        eventually("redis to answer", async || self.try_command(&["PING"]).await).await;
    }

    /// Ends it as `kill -9` does.
    pub fn kill(&mut self) {
        self.process = None;
    }

    pub fn freeze(&self) {
        self.process.as_ref().expect("it runs").signal(rustix::process::Signal::STOP);
    }

    pub fn thaw(&self) {
        self.process.as_ref().expect("it runs").signal(rustix::process::Signal::CONT);
    }

    /// Runs one command, and gives the raw reply.
    pub async fn command(&self, arguments: &[&str]) -> redis::Value {
        soon("redis to answer", self.try_command(arguments)).await.expect("redis takes the command")
    }

    async fn try_command(&self, arguments: &[&str]) -> Option<redis::Value> {
        self.query(arguments).await.ok()
    }

    /// Runs one command, and gives what it comes to.
    pub async fn query<T: redis::FromRedisValue>(&self, arguments: &[&str]) -> redis::RedisResult<T> {
        let client = redis::Client::open(self.url())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        redis::cmd(arguments[0]).arg(&arguments[1..]).query_async(&mut connection).await
    }

    /// A field of `INFO`.
    pub async fn info(&self, section: &str, field: &str) -> Option<String> {
        let info: String = self.query(&["INFO", section]).await.ok()?;
        let value = info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.map(|value| value.trim_end().to_owned())
    }

    /// Waits until a field of `INFO` has a value.
    pub async fn await_info(&self, section: &str, field: &str, expected: &str) {
        eventually(&format!("{field}:{expected}"), async || {
            (self.info(section, field).await? == expected).then_some(())
        })
        .await;
    }

    /// How many clients of Redis are subscribed to a channel.
    pub async fn numsub(&self, channel: &str) -> i64 {
        match self.command(&["PUBSUB", "NUMSUB", channel]).await {
            redis::Value::Array(reply) => match reply.as_slice() {
                [_, redis::Value::Int(number)] => *number,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }
}
