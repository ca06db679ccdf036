//! The tasks that know Redis: for each server one that listens and one that publishes; one for the registry; and
//! one that looks for the servers where they can change.

use std::sync::Arc;

use redis::cluster::ClusterClient;
use redis::{IntoConnectionInfo, ProtocolVersion};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::broker::Broker;
use crate::commands::Place;
use crate::config::Config;
use crate::multiplexer;
use crate::publisher::{self, Jobs};
use crate::redis_cluster;
use crate::redis_config::RedisMode;
use crate::redis_link::{Access, CONNECT_TIMEOUT, Endpoint, Node};
use crate::redis_sentinel;
use crate::registry_writer;
use crate::repair;
use crate::servers::Servers;
use crate::topology::{NODES_MAX, Topology};

/// What is built before the tasks can start.
#[derive(Debug)]
pub struct Redis {
    servers: Arc<Servers>,
    jobs: Vec<Jobs>,
    urls: Vec<Access>,
    client_name: Arc<str>,
}

/// Where the links go, and the task that looks for that.
struct Places {
    endpoints: Vec<Endpoint>,
    registry: Place,
    search: Option<JoinHandle<()>>,
}

impl Redis {
    /// Everything but the tasks; nothing if no Redis is configured.
    ///
    /// # Errors
    /// A URL that cannot be used.
    pub fn new(config: &Config, instance_id: &str) -> anyhow::Result<Option<Self>> {
        if config.redis_urls.is_empty() {
            return Ok(None);
        }
        // Whoever embeds the gateway may have chosen one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client_name: Arc<str> = format!("hubcast-{instance_id}").into();
        let access = |url: &String| Ok(Access::new(url.as_str().into_connection_info()?, &client_name));
        let urls = config.redis_urls.iter().map(access).collect::<redis::RedisResult<Vec<_>>>()?;
        let prefix = &config.redis_channel_prefix;
        let topology = match config.redis_mode {
            RedisMode::Standalone => Topology::servers_of(urls.len(), prefix),
            RedisMode::Sentinel => Topology::servers_of(1, prefix),
            RedisMode::Cluster => Topology::partitions_of(config.redis_partitions, prefix),
        };
        let (servers, jobs) = Servers::new(Arc::new(topology), config.publish_timeout);
        Ok(Some(Self { servers: Arc::new(servers), jobs, urls, client_name }))
    }

    /// The servers.
    pub fn servers(&self) -> Arc<Servers> {
        Arc::clone(&self.servers)
    }

    /// Where channels live.
    pub fn topology(&self) -> Arc<Topology> {
        Arc::clone(&self.servers.topology)
    }

    /// Starts the tasks.
    ///
    /// # Errors
    /// Seeds of a cluster that do not fit together.
    pub fn start(self, config: &Config, broker: &Arc<Broker>) -> anyhow::Result<Vec<JoinHandle<()>>> {
        let places = match config.redis_mode {
            RedisMode::Standalone => self.standalone(broker),
            RedisMode::Sentinel => self.sentinel(config, broker),
            RedisMode::Cluster => self.cluster(config, broker)?,
        };
        let mut tasks = Vec::from_iter(places.search);
        for ((server, jobs), endpoint) in self.jobs.into_iter().enumerate().zip(places.endpoints) {
            let servers = Arc::clone(&self.servers);
            let (key_prefix, timeout) = (config.redis_key_prefix.as_str().into(), config.publish_timeout);
            let publish =
                publisher::run(endpoint.clone(), jobs, Arc::clone(broker), servers, server, key_prefix, timeout);
            let settings = multiplexer::Settings {
                server,
                channel_prefix: config.redis_channel_prefix.as_str().into(),
                probe_interval: config.redis_probe_interval,
            };
            let listen = multiplexer::run(endpoint, settings, Arc::clone(broker), Arc::clone(&self.servers));
            tasks.extend([tokio::spawn(publish), tokio::spawn(listen)]);
        }
        if config.channel_rules.any_history() {
            let settings = repair::Settings {
                key_prefix: config.redis_key_prefix.as_str().into(),
                check_interval: config.history_check_interval,
            };
            tasks.push(tokio::spawn(repair::run(Arc::clone(broker), Arc::clone(&self.servers), settings)));
        }
        if let Some(registry) = &broker.shared.registry {
            let roll = Arc::clone(&broker.shared);
            tasks.push(tokio::spawn(registry_writer::run(places.registry, Arc::clone(registry), roll)));
        }
        Ok(tasks)
    }

    /// The registry is on the first server.
    fn standalone(&self, broker: &Broker) -> Places {
        let endpoint = |access: &Access| Endpoint::fixed(access.clone());
        let endpoints: Vec<_> = self.urls.iter().map(endpoint).collect();
        broker.shared.metrics.redis_servers.set(endpoints.len() as i64);
        Places { registry: Place::Server(endpoints[0].clone()), endpoints, search: None }
    }

    fn sentinel(&self, config: &Config, broker: &Broker) -> Places {
        broker.shared.metrics.redis_servers.set(1);
        let (found, node) = watch::channel(None);
        // Each link has its own doubts; whichever comes first has the sentinels asked.
        let doubt = Arc::new(Notify::new());
        let endpoint = Endpoint::found(node, &doubt);
        let search = redis_sentinel::watch(self.urls.clone(), config.redis_sentinel_master.clone(), found, doubt);
        let registry = Place::Server(endpoint.clone());
        Places { endpoints: vec![endpoint], registry, search: Some(tokio::spawn(search)) }
    }

    fn cluster(&self, config: &Config, broker: &Arc<Broker>) -> anyhow::Result<Places> {
        let doubt = Arc::new(Notify::new());
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..NODES_MAX).map(|_| watch::channel(None::<Node>)).unzip();
        // The last place is nobody's: its sender is gone, so its links wait for ever.
        let nobody = watch::channel(None).1;
        let endpoints = receivers.into_iter().chain([nobody]);
        let endpoints = endpoints.map(|node| Endpoint::found(node, &doubt)).collect();
        let watch =
            redis_cluster::watch(self.urls.clone(), self.topology(), senders, Arc::clone(&doubt), Arc::clone(broker));
        let client = ClusterClient::builder(config.redis_urls.iter().map(String::as_str))
            .use_protocol(ProtocolVersion::RESP3)
            .connection_timeout(CONNECT_TIMEOUT)
            .response_timeout(registry_writer::RESPONSE_TIMEOUT)
            .build()?;
        let registry = Place::Cluster(Box::new(client), Arc::clone(&self.client_name));
        Ok(Places { endpoints, registry, search: Some(tokio::spawn(watch)) })
    }
}
