//! One HTTP connection to an internal listener, which says of each request whether it was sent.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(2);

/// How long an answer may take; a gateway gives up sooner (`HUBCAST_PUBLISH_TIMEOUT`).
const ANSWER: Duration = Duration::from_secs(10);

/// What came of a request.
pub(crate) enum Reply {
    Answered(StatusCode, Bytes),
    /// Nothing was sent, and why.
    Unsent(String),
    /// It may have been sent, and why nobody knows.
    Unknown(String),
}

/// Connects when it is needed.
pub(crate) struct Link {
    authority: String,
    api_key: Option<String>,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Link {
    /// For `http://host:port`.
    pub(crate) fn new(url: &str, api_key: Option<&str>) -> anyhow::Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("{url} is no URL"))?;
        if uri.scheme_str() != Some("http") {
            bail!("{url} does not begin with http://");
        }
        let authority = uri.authority().with_context(|| format!("{url} names no host"))?;
        let port = authority.port_u16().unwrap_or(80);
        let authority = format!("{}:{port}", authority.host());
        Ok(Self { authority, api_key: api_key.map(str::to_owned), sender: None })
    }

    /// Sends a request and waits for its answer. `headers` are names and values.
    pub(crate) async fn request(&mut self, method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let mut request = Request::builder().method(method).uri(path).header(HOST, &self.authority);
        if let Some(key) = &self.api_key {
            request = request.header("x-api-key", key);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
        let request = match request.header(CONTENT_TYPE, "application/json").body(body) {
            Ok(request) => request,
            Err(error) => return Reply::Unsent(error.to_string()),
        };
        let mut sender = match self.sender().await {
            Ok(sender) => sender,
            Err(error) => return Reply::Unsent(format!("{error:#}")),
        };
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
        };
        match timeout(ANSWER, answer).await {
            Ok(Ok((status, body))) => {
                self.sender = Some(sender);
                Reply::Answered(status, body)
            }
            Ok(Err(error)) => Reply::Unknown(error.to_string()),
            Err(_) => Reply::Unknown("no answer in time".to_owned()),
        }
    }

    /// The connection that is there, if it still is; else a new one.
    async fn sender(&mut self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        if let Some(mut sender) = self.sender.take()
            && sender.ready().await.is_ok()
        {
            return Ok(sender);
        }
        let socket = timeout(CONNECT, TcpStream::connect(&self.authority)).await.context("no connection in time")??;
        socket.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
        // It ends with its sender; what goes wrong with it the request tells.
        tokio::spawn(connection);
        Ok(sender)
    }
}
