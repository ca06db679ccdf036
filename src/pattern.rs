//! Patterns of channel names: in rules, and in the capabilities of tokens. Pure.
//!
//! A name as it is, or with `*` at its end for any rest. In a rule `{sub}` may stand once for a user's name.

/// A pattern of channel names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// What the name begins with.
    prefix: Box<str>,
    /// What follows the user's name, where the pattern has one.
    behind_user: Option<Box<str>>,
    /// Anything may follow.
    is_open: bool,
}

const USER: &str = "{sub}";

impl std::fmt::Display for Pattern {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.prefix)?;
        if let Some(behind) = &self.behind_user {
            write!(formatter, "{USER}{behind}")?;
        }
        formatter.write_str(if self.is_open { "*" } else { "" })
    }
}

impl Pattern {
    /// Reads a pattern that may have `{sub}` in it.
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, is_open) = match text.strip_suffix('*') {
            Some(name) => (name, true),
            None => (text, false),
        };
        let (prefix, behind_user) = match name.split_once(USER) {
            Some((prefix, behind)) => (prefix, Some(behind)),
            None => (name, None),
        };
        let literals = [prefix, behind_user.unwrap_or_default()];
        if literals.iter().any(|literal| literal.contains('*')) {
            return Err(format!("{text:?} has a * that is not at the end"));
        }
        if literals.iter().any(|literal| literal.contains(['{', '}'])) {
            return Err(format!("{text:?} has braces: only {USER} may stand in a rule, once"));
        }
        if is_open && behind_user == Some("") {
            return Err(format!("{text:?}: something has to stand between {USER} and *"));
        }
        Ok(Self { prefix: prefix.into(), behind_user: behind_user.map(Into::into), is_open })
    }

    /// Reads a pattern of a capability, which is the same for everybody.
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn parse_plain(text: &str) -> Result<Self, String> {
        let pattern = Self::parse(text)?;
        if pattern.is_private() { Err(format!("{text:?}: {USER} stands in rules only")) } else { Ok(pattern) }
    }

    /// Whether the channels belong to a user each.
    pub fn is_private(&self) -> bool {
        self.behind_user.is_some()
    }

    /// Whether a channel is meant, whoever asks.
    pub fn matches(&self, channel: &str) -> bool {
        self.parts(channel).is_some()
    }

    /// Whose channel it is, if it is one that belongs to a user.
    ///
    /// The name ends before the first character that follows it in the pattern: who has that in his name owns
    /// no such channel, so that no two users can own the same one.
    pub fn owner<'a>(&self, channel: &'a str) -> Option<&'a str> {
        self.parts(channel).flatten()
    }

    /// The user's part of a channel that is meant.
    fn parts<'a>(&self, channel: &'a str) -> Option<Option<&'a str>> {
        let rest = channel.strip_prefix(&*self.prefix)?;
        let ends = |rest: &str| self.is_open || rest.is_empty();
        match self.behind_user.as_deref() {
            None => ends(rest).then_some(None),
            Some(behind) => {
                let end = behind.chars().next().map_or(Some(rest.len()), |first| rest.find(first))?;
                let (user, rest) = rest.split_at(end);
                (!user.is_empty() && ends(rest.strip_prefix(behind)?)).then_some(Some(user))
            }
        }
    }
}
