//! What the configuration says about the public listener's edge: who gets in, before anything else is asked.

use crate::config::{ConfigError, Values};
use crate::origin::{ORIGINS_ALLOWED, Origins};

/// The values of the edge.
#[derive(Clone, Debug)]
pub struct EdgeConfig {
    /// `HUBCAST_ORIGINS`
    pub origins: Origins,
}

impl EdgeConfig {
    pub(crate) fn parse(values: &Values) -> Result<Self, ConfigError> {
        Ok(Self { origins: values.get("HUBCAST_ORIGINS", ORIGINS_ALLOWED, Origins::parse)? })
    }

    /// The effective value of a variable of the edge.
    pub(crate) fn print(&self, name: &str) -> Option<String> {
        match name {
            "HUBCAST_ORIGINS" => Some(self.origins.to_string()),
            _ => None,
        }
    }
}
