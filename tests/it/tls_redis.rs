//! A Redis that talks TLS only, to those who know a user and a password.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use crate::harness::{Port, Process, eventually};

const USER: &str = "hub";
const PASSWORD: &str = "secret";

/// What README says that a gateway needs.
pub const RIGHTS: &str = "~ws:* &hub:* -@all +@connection -@admin +@pubsub +@string +@set +@sortedset +@stream +exists +unlink +del +pexpire +pexpireat +time +role +eval +evalsha +script|load \
    +info +cluster|info +cluster|slots";

/// A `redis-server` for `localhost` and 127.0.0.1 with a certificate of its own authority.
pub struct TlsRedis {
    port: Port,
    dir: TempDir,
    process: Option<Process>,
}

impl TlsRedis {
    pub async fn start() -> Self {
        let dir = TempDir::new().expect("a directory");
        write_certificates(dir.path());
        let mut redis = Self { port: Port::claim(), dir, process: None };
        redis.restart().await;
        redis
    }

    pub fn addr(&self) -> SocketAddr {
        self.port.addr()
    }

    /// With user and password.
    pub fn url(&self) -> String {
        format!("rediss://{USER}:{PASSWORD}@localhost:{}/", self.addr().port())
    }

    /// The certificate of the authority that signed the server's, as PEM.
    pub fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// One that signed nothing here.
    pub fn other_ca_file(&self) -> PathBuf {
        self.dir.path().join("other-ca.pem")
    }

    /// Starts the server on the same port, empty.
    pub async fn restart(&mut self) {
        let path = |name| self.dir.path().join(name);
        let child = Command::new("redis-server")
            .args(["--port", "0", "--tls-port", &self.addr().port().to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--tls-auth-clients", "no", "--dir"])
            .arg(self.dir.path())
            .arg("--tls-ca-cert-file")
            .arg(self.ca_file())
            .arg("--tls-cert-file")
            .arg(path("server.pem"))
            .arg("--tls-key-file")
            .arg(path("server.key"))
            .args(["--user", USER, "on", &format!(">{PASSWORD}")])
            .args(RIGHTS.split(' '))
            // For the tests themselves.
            .args(["+client|list", "+acl|whoami"])
            .args(["--user", "default", "off"])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed (.ci/run installs it)");
        self.process = Some(Process(child));
        eventually("redis to answer", async || (self.command(&["PING"]) == "PONG").then_some(())).await;
    }

    /// Ends it as `kill -9` does.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Runs one command, and gives what `redis-cli` says to it.
    pub fn command(&self, arguments: &[&str]) -> String {
        self.command_with(&self.ca_file(), &self.url(), arguments)
    }

    fn command_with(&self, ca_file: &Path, url: &str, arguments: &[&str]) -> String {
        let mut command = Command::new("redis-cli");
        command.args(["--no-auth-warning", "--cacert"]).arg(ca_file).args(["-u", url]).args(arguments);
        let output = command.output().expect("redis-cli is installed (.ci/run installs it)");
        let said = if output.status.success() { output.stdout } else { output.stderr };
        String::from_utf8_lossy(&said).trim().to_owned()
    }
}

/// `ca.pem`, `server.pem` and `server.key`, and `other-ca.pem`.
fn write_certificates(dir: &Path) {
    let write = |name, text: String| std::fs::write(dir.join(name), text).expect("the directory is ours");
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // Of the same name as the server's it would be taken for one that the server signed itself.
    authority.distinguished_name.push(DnType::CommonName, "hubcast's test authority");
    let [key, other_key, server_key] = [(); 3].map(|()| KeyPair::generate().expect("a key"));
    for (name, key) in [("ca.pem", &key), ("other-ca.pem", &other_key)] {
        write(name, authority.self_signed(key).expect("a certificate").pem());
    }
    let server = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("two names");
    let signed = server.signed_by(&server_key, &Issuer::from_params(&authority, &key)).expect("a certificate");
    write("server.pem", signed.pem());
    write("server.key", server_key.serialize_pem());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tls_redis_answers_who_trusts_it_and_knows_the_password() {
    let mut redis = TlsRedis::start().await;
    assert_eq!(redis.command(&["ACL", "WHOAMI"]), USER);
    let untrusted = redis.command_with(&redis.other_ca_file(), &redis.url(), &["PING"]);
    assert!(untrusted.contains("certificate verify failed"), "{untrusted}");
    let wrong = redis.url().replace(PASSWORD, "wrong");
    let refused = redis.command_with(&redis.ca_file(), &wrong, &["PING"]);
    assert!(refused.contains("WRONGPASS") || refused.contains("NOAUTH"), "{refused}");
    redis.kill();
    assert!(redis.command(&["PING"]).contains("refused"));
    redis.restart().await;
}
