//! What HTTP requests are answered: JSON, text, or an error with the fitting status.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use crate::admission::Denied;
use crate::protocol::{ErrorCode, Refusal};

/// A refusal with its HTTP status.
#[derive(Debug)]
pub struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) refusal: Refusal,
}

/// A response, or why there is none.
pub type Answer = Result<Response<Full<Bytes>>, ApiError>;

impl ApiError {
    /// No such resource.
    pub fn not_found() -> Self {
        ErrorCode::NotFound.with("there is nothing here")
    }

    /// A handshake that is refused with the given status.
    pub fn handshake(status: StatusCode, message: &str) -> Self {
        let code =
            if status == StatusCode::SERVICE_UNAVAILABLE { ErrorCode::Unavailable } else { ErrorCode::BadRequest };
        Self { status, refusal: Refusal::new(code, message.to_owned()) }
    }

    /// Somebody who is not let in, for now.
    pub fn denied(denied: &Denied) -> Self {
        let retry_after_ms = Some(denied.retry_after_s() * 1000);
        let refusal = Refusal { retry_after_ms, ..Refusal::new(denied.code(), denied.message()) };
        Self { status: denied.status(), refusal }
    }

    /// The response, after which the connection ends: whoever is refused holds nothing.
    pub fn last_response(&self) -> Response<Full<Bytes>> {
        let mut response = error_response(self);
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    }

    pub(crate) fn method_not_allowed() -> Self {
        ErrorCode::MethodNotAllowed.with("this path takes another method")
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self { status: status_of(refusal.code), refusal }
    }
}

impl ErrorCode {
    pub(crate) fn with(self, message: impl Into<std::borrow::Cow<'static, str>>) -> ApiError {
        Refusal::new(self, message).into()
    }
}

pub(crate) fn status_of(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::BadRequest | ErrorCode::UnknownType => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::Forbidden => StatusCode::FORBIDDEN,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::LimitExceeded | ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::OutcomeUnknown => StatusCode::GATEWAY_TIMEOUT,
    }
}

pub(crate) fn bad_json(error: &serde_json::Error) -> ApiError {
    ErrorCode::BadRequest.with(format!("the body is not what is expected here: {error}"))
}

pub(crate) fn error_json(refusal: &Refusal) -> Value {
    let mut error = json!({ "code": refusal.code.as_str(), "message": refusal.message });
    if refusal.code == ErrorCode::OutcomeUnknown {
        error["outcome"] = "unknown".into();
    }
    error
}

/// `{"error":{"code","message"}}` with the fitting status.
pub fn error_response(error: &ApiError) -> Response<Full<Bytes>> {
    let mut response = json_response(error.status, &json!({ "error": error_json(&error.refusal) }));
    let retry_after_ms = error.refusal.retry_after_ms;
    if retry_after_ms.is_some() || error.status == StatusCode::SERVICE_UNAVAILABLE {
        let seconds = retry_after_ms.unwrap_or_default().div_ceil(1000).max(1);
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if error.status == StatusCode::UNAUTHORIZED {
        // RFC 9110 §11.6.1.
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if matches!(error.status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
        // The rest of the body is not read, so the connection cannot go on.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

pub(crate) fn json_response(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = text(status, format!("{body}\n"));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(crate) fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
