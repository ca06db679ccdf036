//! What a session knows of who it serves: the token that was shown, and what that allows.
//!
//! Only with `HUBCAST_AUTH=jwt`. A client shows its token in the handshake, or by its first command; until then it
//! can do nothing, and its place is one of those for handshakes in progress.

use std::sync::Arc;

use crate::access::{self, Who};
use crate::admission::Pending;
use crate::authenticator::{Authenticator, unix_s};
use crate::close::CloseReason;
use crate::connection::Connection;
use crate::event::{self, Authenticated};
use crate::fanout::Fanout;
use crate::guests::Stay;
use crate::identity::{Action, Identity};
use crate::jwt::Fault;
use crate::protocol::{Command, ErrorCode, Refusal, Request};
use crate::session::Session;
use crate::tab::Share;

/// What everybody is told whose token is refused: why is nobody's business who forges them.
const INVALID: &str = "the token is not valid";

/// Why a subscription ends that is not granted any more.
const FORBIDDEN: &str = "forbidden";
const TOKEN_EXPIRED: &str = "token_expired";

/// Who a session serves.
#[derive(Debug, Default)]
pub struct Pass {
    identity: Option<Arc<Identity>>,
    grants: Vec<Grant>,
    /// Until it has shown a token.
    stranger: Option<Pending>,
    /// Its place among the connections of its user.
    stay: Stay<Box<str>>,
    /// Channels of the handshake, to be subscribed once it is known who it is.
    wanted: Vec<String>,
    /// A token whose key may have to be fetched, with its command's id.
    unverified: Option<Shown>,
}

/// A token that was shown by a command.
#[derive(Debug)]
pub(crate) struct Shown {
    id: Option<Box<str>>,
    token: Box<str>,
}

/// A token that was shown for one channel.
#[derive(Debug)]
struct Grant {
    channel: Box<str>,
    identity: Identity,
}

impl Pass {
    /// It has shown a good token already.
    pub fn known(identity: Arc<Identity>) -> Self {
        Self { identity: Some(identity), ..Self::default() }
    }

    /// It has to show one.
    pub fn stranger(pending: Pending) -> Self {
        Self { stranger: Some(pending), ..Self::default() }
    }

    /// Whether a token waits for its key.
    pub(crate) fn is_verifying(&self) -> bool {
        self.unverified.is_some()
    }

    /// Whether nothing is known of it yet.
    pub(crate) fn is_stranger(&self) -> bool {
        self.identity.is_none()
    }

    /// Channels to subscribe once it is known who it is.
    pub(crate) fn want(&mut self, channels: &[String]) {
        self.wanted = channels.to_vec();
    }

    pub(crate) fn take_unverified(&mut self) -> Option<Shown> {
        self.unverified.take()
    }

    /// For the welcome.
    pub(crate) fn authenticated(&self) -> Option<Authenticated<'_>> {
        self.identity.as_deref().map(authenticated)
    }

    fn who(&self, channel: &str) -> Result<Who<'_>, Refusal> {
        let identity = self.identity.as_deref().ok_or_else(authenticate_first)?;
        let grant = self.grants.iter().find(|grant| *grant.channel == *channel);
        Ok(Who {
            user: identity.user.as_deref(),
            capabilities: &identity.capabilities,
            grant: grant.map(|grant| &grant.identity.capabilities),
        })
    }
}

impl Shown {
    /// Verifies the token, whose key may have to be fetched.
    pub(crate) async fn verify(self, authenticator: Option<&Authenticator>) -> Verified {
        let outcome = match authenticator {
            Some(authenticator) => authenticator.authenticate(&self.token).await,
            None => Err(Fault::UnknownKey),
        };
        Verified { id: self.id, outcome }
    }
}

/// What came of a token that had to wait.
pub(crate) struct Verified {
    id: Option<Box<str>>,
    outcome: Result<Identity, Fault>,
}

fn authenticated(identity: &Identity) -> Authenticated<'_> {
    let expires_in_ms = identity.expires_s.saturating_sub(unix_s()) * 1000;
    Authenticated { user: identity.user.as_deref(), expires_in_ms }
}

fn authenticate_first() -> Refusal {
    Refusal::new(ErrorCode::Unauthorized, "authenticate first")
}

impl Session {
    /// Whether a command has to wait until it is known who sends it.
    pub(crate) fn check_pass(&self, request: &Request<'_>) -> Result<(), Refusal> {
        match (self.pass.as_deref(), &request.command) {
            (None, _) | (_, Err(_) | Ok(Command::Auth { .. } | Command::Ping)) => Ok(()),
            (Some(pass), _) if pass.is_verifying() => {
                let message = "the token is being verified";
                Err(Refusal { retry_after_ms: Some(100), ..Refusal::new(ErrorCode::Unavailable, message) })
            }
            (Some(pass), _) if pass.is_stranger() => Err(authenticate_first()),
            _ => Ok(()),
        }
    }

    /// Whether the client may do that, see [`access::decide`].
    pub(crate) fn authorize(&self, action: Action, channel: &str) -> Result<(), Refusal> {
        let who = self.pass.as_deref().map(|pass| pass.who(channel)).transpose()?;
        access::decide(&self.context.rules, who, action, channel).map(drop).map_err(|forbidden| {
            self.connection.shared().metrics.forbidden(action);
            forbidden.into()
        })
    }

    /// The client shows a token.
    pub(crate) fn show_token(&mut self, id: Option<&str>, token: &str, fanout: &mut Fanout<Arc<Connection>>) {
        let broker = Arc::clone(&self.context.broker);
        let (Some(authenticator), Some(pass)) = (&broker.authenticator, self.pass.as_deref_mut()) else {
            // Nobody has to, so the same client works with and without.
            return self.reply(&event::authenticated(id, None), fanout);
        };
        let outcome = authenticator.check(token);
        if authenticator.is_settled(&outcome) {
            let id = id.map(Into::into);
            self.take_verified(Verified { id, outcome }, fanout);
        } else {
            pass.unverified = Some(Shown { id: id.map(Into::into), token: token.into() });
        }
    }

    /// The client has shown a token, and this came of it.
    pub(crate) fn take_verified(&mut self, verified: Verified, fanout: &mut Fanout<Arc<Connection>>) {
        let Verified { id, outcome } = verified;
        Authenticator::count(&self.connection.shared().metrics, &outcome);
        if let Err(text) = self.let_in(id.as_deref(), outcome, fanout) {
            let refusal = Refusal::new(ErrorCode::Unauthorized, text);
            self.reply(&event::error(id.as_deref(), &refusal, None), fanout);
            self.connection.close(CloseReason::Unauthorized(text));
        }
    }

    fn let_in(
        &mut self,
        id: Option<&str>,
        outcome: Result<Identity, Fault>,
        fanout: &mut Fanout<Arc<Connection>>,
    ) -> Result<(), &'static str> {
        let identity = Arc::new(outcome.map_err(|_| INVALID)?);
        let Some(pass) = self.pass.as_deref_mut() else { return Ok(()) };
        match &pass.identity {
            Some(before) if before.user != identity.user => return Err("the token is another user's"),
            Some(_) => {}
            None => match self.context.admission.admit_user(identity.user.as_deref(), self.batch_us) {
                Ok(stay) => {
                    stay.tab().into_iter().for_each(|tab| self.allowance.share(Share::new(tab)));
                    (pass.stay, pass.stranger) = (stay, None);
                }
                Err(denied) => {
                    self.connection.close(CloseReason::Overload(denied.message()));
                    return Ok(());
                }
            },
        }
        let wanted = std::mem::take(&mut pass.wanted);
        pass.identity = Some(Arc::clone(&identity));
        self.connection.authenticated(&identity);
        self.reply(&event::authenticated(id, Some(&authenticated(&identity))), fanout);
        self.leave_forbidden(FORBIDDEN, fanout);
        self.subscribe_all(&wanted, fanout);
        // Whoever revoked it meanwhile has looked for it before it was to be seen.
        self.check_revoked();
        Ok(())
    }

    /// Closes the connection if its token is revoked.
    pub(crate) fn check_revoked(&self) {
        let authenticator = self.context.broker.authenticator.as_ref();
        let identity = self.pass.as_ref().and_then(|pass| pass.identity.as_ref());
        if let (Some(authenticator), Some(identity)) = (authenticator, identity)
            && authenticator.revocations.concern(identity)
        {
            self.connection.close(CloseReason::Revoked);
        }
    }

    /// The client shows a token for one channel, and keeps what it grants there until it expires.
    pub(crate) fn take_grant(&mut self, channel: &str, token: &str) -> Result<(), Refusal> {
        let broker = Arc::clone(&self.context.broker);
        let (Some(authenticator), Some(pass)) = (&broker.authenticator, self.pass.as_deref_mut()) else {
            return Ok(());
        };
        let outcome = authenticator.check(token);
        if !authenticator.is_settled(&outcome) {
            let authenticator = Arc::clone(authenticator);
            tokio::spawn(async move { authenticator.learn().await });
            let message = "the key of the token is being fetched";
            return Err(Refusal { retry_after_ms: Some(1000), ..Refusal::new(ErrorCode::Unavailable, message) });
        }
        Authenticator::count(&broker.shared.metrics, &outcome);
        let identity = outcome.map_err(|_| Refusal::new(ErrorCode::Unauthorized, INVALID))?;
        let own = pass.identity.as_ref().and_then(|identity| identity.user.as_ref());
        if identity.user.is_some() && identity.user.as_ref() != own {
            return Err(Refusal::new(ErrorCode::Forbidden, "the token is another user's"));
        }
        // Whether it grants anything is decided with the rest.
        pass.grants.retain(|grant| *grant.channel != *channel);
        if pass.grants.len() >= self.context.subscriptions_max {
            return Err(Refusal::new(ErrorCode::LimitExceeded, "too many tokens for channels on this connection"));
        }
        pass.grants.push(Grant { channel: channel.into(), identity });
        self.note_grants();
        Ok(())
    }

    /// The client has left a channel: its token for it counts no more.
    pub(crate) fn drop_grant(&mut self, channel: &str) {
        if let Some(pass) = self.pass.as_deref_mut().filter(|pass| !pass.grants.is_empty()) {
            pass.grants.retain(|grant| *grant.channel != *channel);
            self.note_grants();
        }
    }

    /// Looks at the tokens for single channels; those that are over, and what only they granted, go.
    pub(crate) fn recheck_grants(&mut self, fanout: &mut Fanout<Arc<Connection>>) {
        let broker = Arc::clone(&self.context.broker);
        let (Some(authenticator), Some(pass)) = (&broker.authenticator, self.pass.as_deref_mut()) else { return };
        let (now_s, before) = (unix_s(), pass.grants.len());
        pass.grants.retain(|Grant { identity, .. }| {
            identity.expires_s > now_s && !authenticator.revocations.concern(identity)
        });
        if pass.grants.len() < before {
            self.note_grants();
            self.leave_forbidden(TOKEN_EXPIRED, fanout);
        }
    }

    fn note_grants(&self) {
        let grants = self.pass.iter().flat_map(|pass| &pass.grants);
        self.connection.holder().grants_expire(grants.map(|grant| grant.identity.expires_s).min());
    }

    /// Ends the subscriptions that are not granted any more.
    fn leave_forbidden(&mut self, reason: &str, fanout: &mut Fanout<Arc<Connection>>) {
        let is_forbidden = |channel: &String| self.authorize(Action::Subscribe, channel).is_err();
        let forbidden: Vec<_> = self.subscriptions.names().map(str::to_owned).filter(is_forbidden).collect();
        for channel in forbidden {
            self.subscriptions.unsubscribe(&channel, &event::ended(&channel, reason), fanout);
        }
        self.note_subscriptions();
    }
}
