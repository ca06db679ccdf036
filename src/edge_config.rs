//! What the configuration says about the public listener's edge: who gets in, before anything else is asked.

use std::path::PathBuf;

use crate::config::{ConfigError, Values};
use crate::origin::{ORIGINS_ALLOWED, Origins};
use crate::proxies::{ForwardingHeader, HEADER_ALLOWED, PROXIES_ALLOWED, Proxies, parse_networks};
use crate::tls::TlsPaths;

/// The values of the edge.
#[derive(Clone, Debug)]
pub struct EdgeConfig {
    /// `HUBCAST_ORIGINS`
    pub origins: Origins,
    /// `HUBCAST_TRUSTED_PROXIES` and `HUBCAST_FORWARDING_HEADER`
    pub proxies: Proxies,
    /// `HUBCAST_PROXY_PROTOCOL`
    pub proxy_protocol: bool,
    /// `HUBCAST_TLS_CERT` and `HUBCAST_TLS_KEY`
    pub tls: Option<TlsPaths>,
}

impl EdgeConfig {
    pub(crate) fn parse(values: &Values) -> Result<Self, ConfigError> {
        let networks = values.get("HUBCAST_TRUSTED_PROXIES", PROXIES_ALLOWED, parse_networks)?;
        let header = values.get("HUBCAST_FORWARDING_HEADER", HEADER_ALLOWED, ForwardingHeader::parse)?;
        let proxy_protocol = values.get("HUBCAST_PROXY_PROTOCOL", "on or off", |text| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        })?;
        if proxy_protocol && networks.is_empty() {
            return Err(ConfigError::new("HUBCAST_PROXY_PROTOCOL=on: allowed only with HUBCAST_TRUSTED_PROXIES"));
        }
        Ok(Self {
            origins: values.get("HUBCAST_ORIGINS", ORIGINS_ALLOWED, Origins::parse)?,
            proxies: Proxies::new(networks, header),
            proxy_protocol,
            tls: tls_paths(values)?,
        })
    }

    /// The effective value of a variable of the edge.
    pub(crate) fn print(&self, name: &str) -> Option<String> {
        Some(match name {
            "HUBCAST_ORIGINS" => self.origins.to_string(),
            "HUBCAST_TRUSTED_PROXIES" => {
                self.proxies.networks().iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
            }
            "HUBCAST_FORWARDING_HEADER" => self.proxies.header().as_str().to_owned(),
            "HUBCAST_PROXY_PROTOCOL" => if self.proxy_protocol { "on" } else { "off" }.to_owned(),
            "HUBCAST_TLS_CERT" => path(self.tls.as_ref().map(|tls| &tls.certificate)),
            "HUBCAST_TLS_KEY" => path(self.tls.as_ref().map(|tls| &tls.key)),
            _ => return None,
        })
    }
}

/// Both paths, or none.
fn tls_paths(values: &Values) -> Result<Option<TlsPaths>, ConfigError> {
    let (certificate, key) = (values.text("HUBCAST_TLS_CERT"), values.text("HUBCAST_TLS_KEY"));
    match (certificate.is_empty(), key.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(TlsPaths { certificate: certificate.into(), key: key.into() })),
        (false, true) => Err(ConfigError::new("HUBCAST_TLS_CERT: allowed only with HUBCAST_TLS_KEY")),
        (true, false) => Err(ConfigError::new("HUBCAST_TLS_KEY: allowed only with HUBCAST_TLS_CERT")),
    }
}

fn path(path: Option<&PathBuf>) -> String {
    path.map(|path| path.display().to_string()).unwrap_or_default()
}
