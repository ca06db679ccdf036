//! Files that are read again when they change: API keys, certificates.
//!
//! Contents are compared and not times, so that a file that is written in place, one that is replaced, and the
//! symbolic link that Kubernetes swaps all work. What cannot be used leaves in effect what was there before.

use std::io::{self, Read as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ring::digest;
use tracing::{error, info};

use crate::connection::Shared;
use crate::metrics::Reloaded;

/// How often the files are looked at: some microseconds of work, sooner than anybody waits for a rotated key.
const INTERVAL: Duration = Duration::from_secs(1);

/// Most that is read of one file: a thousand keys, or a long chain of certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Tells contents apart without keeping secrets.
pub type Fingerprint = [u8; digest::SHA256_OUTPUT_LEN];

/// What files held at one moment.
pub struct Contents {
    /// File by file, or the first that cannot be read or is too large.
    pub files: Result<Vec<Vec<u8>>, String>,
    /// To see whether they changed.
    pub fingerprint: Fingerprint,
}

/// Files that change together.
#[derive(Clone, Debug)]
pub struct Files {
    /// What they are to the metrics.
    pub what: Reloaded,
    /// Where they are.
    pub paths: Vec<PathBuf>,
}

impl Files {
    /// What the files hold now.
    pub fn read(&self) -> Contents {
        let read = |path: &PathBuf| read(path).map_err(|error| format!("{}: {error}", path.display()));
        let files = self.paths.iter().map(read).collect();
        Contents { fingerprint: fingerprint(&files), files }
    }

    /// Gives `apply` what the files hold whenever that is no longer what was `seen` last, for ever.
    pub async fn watch(
        self,
        shared: Arc<Shared>,
        mut seen: Fingerprint,
        mut apply: impl FnMut(&[Vec<u8>]) -> Result<(), String>,
    ) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let files = self.clone();
            let Ok(contents) = tokio::task::spawn_blocking(move || files.read()).await else { return };
            if std::mem::replace(&mut seen, contents.fingerprint) == contents.fingerprint {
                continue;
            }
            let outcome = contents.files.and_then(|files| apply(&files));
            shared.metrics.reloaded(self.what, outcome.is_ok());
            let what = self.what.as_str();
            match outcome {
                Ok(()) => info!(what, "read anew"),
                Err(error) => error!(what, %error, "cannot be used, so what was read before stays"),
            }
        }
    }
}

fn read(path: &PathBuf) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    std::fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("it is above {FILE_BYTES_MAX} bytes")));
    }
    Ok(contents)
}

fn fingerprint(contents: &Result<Vec<Vec<u8>>, String>) -> Fingerprint {
    let mut context = digest::Context::new(&digest::SHA256);
    match contents {
        Ok(contents) => contents.iter().for_each(|content| {
            context.update(&(content.len() as u64).to_be_bytes());
            context.update(content);
        }),
        Err(error) => context.update(error.as_bytes()),
    }
    let mut fingerprint = [0; digest::SHA256_OUTPUT_LEN];
    fingerprint.copy_from_slice(context.finish().as_ref());
    fingerprint
}
