//! History at Redis: the three operations of `history_store.rs` as scripts, so that all instances share one chain.
//!
//! Keys, after `HUBCAST_REDIS_KEY_PREFIX`, all of them on the channel's server (in a cluster with the hash tag of its
//! partition, as `history:{17}:{channel}` with real braces):
//! - `history:{channel}`: a stream, each entry with its predecessor (`p`) and either the payload (`e`) or, for a break
//!   marker, the shared id (`m`, `-` without one); it expires after its newest entry;
//! - `history_top:{channel}`: the position;
//! - `history_answer:{channel} {idempotency key}`: the id that a publish was answered with. No channel's name has a space,
//!   so no two of them share such a key.
//!
//! A script checks its arguments and the keys' types first and publishes last: scripts do not roll back. Random bits come
//! from the caller, so that what Redis forgets in a rewind does not come again.

use std::sync::LazyLock;

use bytes::Bytes;
use redis::aio::ConnectionLike;
use redis::{ErrorKind, RedisError, RedisResult, Script, ScriptInvocation, Value};

use crate::cursor::{Cursor, random_bits};
use crate::history_store::{Content, Entry, IDEMPOTENCY_WINDOW, Loss, Marked, Retention, Window};
use crate::history_view::{PAGE_EVENTS_MAX, REPLY_BYTES_MAX, Range};
use crate::topology::Topology;

/// What a message of history starts with, with the version of the format: neither JSON nor text can, nor does presence
/// (`presence_store::MAGIC`). Then follow, each ended by a space, `e` or `m`, the id and the predecessor's id; then the
/// payload byte for byte, or the marker's shared id or `-`.
pub const MAGIC: &[u8] = b"\xFF\x01";

/// What `publish` and `mark` begin with: the arguments that they share, the clock, and the position. Written for speed:
/// each call of a function costs as much as a fifth of a `GET`, so does a number read from text, and `TIME` as much as two.
/// What is not needed is not read, and so not checked: sizes and TTLs but now and then. Arithmetic checks that numbers
/// are ones (Lua ends the script otherwise, and NaN fails every comparison).
const PRELUDE: &str = r"
local call, sub, args = redis.call, string.sub, ARGV
local stream, top, answer = KEYS[1], KEYS[2], KEYS[3]
local random, publish, content = args[4] + 0, args[5], args[7]
local is_known = publish == 'PUBLISH' or publish == 'SPUBLISH'
if not (is_known and content and random >= 0 and random < 281474976710656 and random % 1 == 0) then
    return redis.error_reply('BADARG bad history arguments')
end
local time, last, id = call('TIME'), call('GET', top), nil
";

/// After the shared arguments: the payload; with a third key, how long the answer is remembered.
const ANSWERED: &str = r"
local field, head = 'e', '\255\1e '
if answer then
    local remember = args[8] + 0
    if not (remember >= 1 and remember < 1e13 and remember % 1 == 0) then
        return redis.error_reply('BADARG bad history arguments')
    end
    local answered = call('GET', answer)
    if answered then
        return {answered}
    end
end
";

/// The id, as `ANEW` has it, put together from text where that can be done: in the same millisecond, or in a later one
/// if nothing has to be renewed. Both keys are renewed whenever the milliseconds differ before their last digits, which are
/// one less than those of the TTL: at least once in that time. The stream is trimmed to size roughly, small payloads
/// now and then.
const QUICKLY: &str = r"
if last then
    local micros = time[2]
    if #micros < 6 then
        micros = sub('00000' .. micros, -6)
    end
    local ms, was = time[1] .. sub(micros, 1, 3) .. '-', sub(last, 1, 14)
    if ms == was then
        local next = sub(last, 15) + 1 + (random - random % 65536) / 65536
        id = next < 9007199254740992 and was .. string.format('%d', next)
    elseif ms > was and random >= 10 ^ (#args[4] - 1) then
        local start = 14 - #args[2]
        id = sub(ms, 1, start) == sub(was, 1, start) and ms .. args[4]
    end
    if id and (#content > 2048 or random % 8 == 0) then
        id = call('XADD', stream, 'NOMKSTREAM', 'MAXLEN', '~', args[1], id, 'p', last, field, content)
    elseif id then
        id = call('XADD', stream, 'NOMKSTREAM', id, 'p', last, field, content)
    end
end
if id then
    call('SET', top, id, 'KEEPTTL')
else
";

/// The other arguments, and the id that follows the position.
const ANEW: &str = r"
local format, size, ttl, keep = string.format, args[1] + 0, args[2] + 0, args[3] + 0
if not (size >= 0 and ttl >= 1 and ttl < 1e13 and ttl >= 10 ^ (#args[2] - 1) and keep >= 0 and keep < 1e13) then
    return redis.error_reply('BADARG bad history arguments')
end
local now = time[1] * 1000 + time[2] / 1000
now = now - now % 1
if not last then
    call('DEL', stream)
    last = format('%d-%d', now, random)
end
local dash = string.find(last, '-', 1, true)
local before, next = sub(last, 1, dash - 1) + 0, sub(last, dash + 1) + 1 + (random - random % 65536) / 65536
if now > before then
    id = format('%d-%d', now, random)
elseif next < 9007199254740992 then
    id = format('%d-%d', before, next)
else
    id = format('%d-%d', before + 1, random)
end
";

/// Appends `content` as `field`. The stream is trimmed to size roughly here, and exactly where it is looked at. It outlives
/// its newest entry's age by at most as long again, and so does the position what is asked for.
const APPEND: &str = r"
call('XADD', stream, 'MAXLEN', '~', args[1], id, 'p', last, field, content)
call('PEXPIREAT', stream, format('%d', math.max(now, before) + 2 * ttl))
call('SET', top, id, 'PX', format('%d', keep + ttl))
";

const REMEMBER: &str = r"
end
if answer then
    call('SET', answer, id, 'PX', string.format('%d', args[8]))
end
";

/// Comes last.
const TELL: &str = r"
call(publish, args[6], head .. id .. ' ' .. last .. ' ' .. content)
";

/// Answers the id; one that was given before in a list.
const PUBLISHED: &str = "return id\n";

/// After the shared arguments: the shared id or `-`, the own id, and the markers that were passed. Without a shared id no
/// marker that is older than the own id stands for its loss.
const MARK_UNLESS: &str = r"
local field, head, own, passed = 'm', '\255\1m ', args[8], {}
for i = 9, #args do
    passed[args[i]] = true
end
call('XTRIM', stream, 'MAXLEN', args[1])
call('XTRIM', stream, 'MINID', format('%d', math.max(now - ttl + 1, 0)))
if own == last or #call('XRANGE', stream, own, own) > 0 then
    call('SET', top, last, 'PX', format('%d', keep + ttl))
    return {'exists', last}
end
for _, entry in ipairs(call('XRANGE', stream, content == '-' and own or '-', '+')) do
    if entry[2][3] == 'm' and entry[2][4] == content and (content ~= '-' or not passed[entry[1]]) then
        call('SET', top, last, 'PX', format('%d', keep + ttl))
        return {'already', entry[1]}
    end
end
";

const MARKED: &str = "return {'written', id}\n";

/// What both reads begin with. Arguments: entries at most, TTLs of entries and position, random bits.
const READING: &str = r"
local stream, top = KEYS[1], KEYS[2]
local ttl, keep, random = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if not (ttl and keep and random) then
    return redis.error_reply('BADARG bad history arguments')
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local last = redis.call('GET', top)
if not last then
    redis.call('DEL', stream)
    last = string.format('%d-%d', now, random)
    redis.call('SET', top, last, 'PX', string.format('%d', keep + ttl))
else
    redis.call('PEXPIRE', top, string.format('%d', keep + ttl))
end
local function trim()
    redis.call('XTRIM', stream, 'MAXLEN', ARGV[1])
    redis.call('XTRIM', stream, 'MINID', string.format('%d', math.max(now - ttl + 1, 0)))
end
";

/// After the shared arguments: the position for which the stream is not needed.
const READ_ALL: &str = r"
if last == ARGV[5] then
    return {last, {}}
end
trim()
return {last, redis.call('XRANGE', stream, '-', '+')}
";

/// After the shared arguments: the direction, the id that is read from, and what there is room for: events, and bytes of
/// their payloads. The first entry that has no room is read too: it says that there is more. Behind what was found comes
/// the first entry of all, where it is another one; of that only the place is needed.
const READ_PAGE: &str = r"
local is_after, own, events_max, bytes_max = ARGV[5] == 'after', ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
local command, last_id, from = 'XREVRANGE', '-', own
if is_after then
    command, last_id = 'XRANGE', '+'
end
local count, found, events, bytes, is_full = math.min(events_max + 2, 32), {}, 0, 0, false
trim()
repeat
    local some = redis.call(command, stream, from, last_id, 'COUNT', count)
    for _, entry in ipairs(some) do
        if is_after or entry[1] ~= own then
            found[#found + 1] = entry
        end
        if entry[2][3] == 'e' and entry[1] ~= own then
            events, bytes = events + 1, bytes + #entry[2][4]
        end
        if events > events_max or bytes > bytes_max and events > 1 then
            is_full = true
            break
        end
    end
    from = #some == count and '(' .. some[count][1]
until is_full or not from
local first = is_after and redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
if not first or found[1] and found[1][1] == first[1] then
    return {last, found, {}}
end
if first[2][3] == 'e' then
    first[2][4] = ''
end
return {last, found, {first}}
";

static PUBLISH: LazyLock<Script> = LazyLock::new(|| Script::new(&publish_script()));
static MARK: LazyLock<Script> =
    LazyLock::new(|| Script::new(&format!("{PRELUDE}{ANEW}{MARK_UNLESS}{APPEND}{TELL}{MARKED}")));
static READ: LazyLock<Script> = LazyLock::new(|| Script::new(&format!("{READING}{READ_ALL}")));
static PAGE: LazyLock<Script> = LazyLock::new(|| Script::new(&format!("{READING}{READ_PAGE}")));

/// The script that publishes, for backends that call it themselves.
///
/// Keys: `history:{channel}`, `history_top:{channel}`, and for a publish that may be repeated
/// `history_answer:{channel} {idempotency key}`. Arguments: entries at most, their TTL (ms), the position's TTL (ms),
/// 48 random bits, `PUBLISH` or `SPUBLISH`, the Redis channel, the payload, and with a third key its TTL (ms).
pub fn publish_script() -> String {
    format!("{PRELUDE}{ANSWERED}{QUICKLY}{ANEW}{APPEND}{REMEMBER}{TELL}{PUBLISHED}")
}

/// Has Redis know the script that publishes.
///
/// # Errors
/// Redis is away, or does not allow it.
pub async fn load_publish(link: &mut impl ConnectionLike) -> RedisResult<()> {
    PUBLISH.load_async(link).await.map(drop)
}

/// Where a channel's history is: everything that depends on how Redis is set up.
#[derive(Clone, Debug)]
pub struct Place {
    /// Key of the stream.
    pub stream: String,
    /// Key of the position.
    pub top: String,
    /// What the keys of remembered answers begin with.
    pub answers: String,
    /// Where entries are published: where the channel's plain publications are.
    pub redis_channel: String,
    /// And by which command.
    pub publish: &'static str,
}

impl Place {
    /// The place of a channel, under `HUBCAST_REDIS_KEY_PREFIX`.
    pub fn new(key_prefix: &str, channel: &str, topology: &Topology) -> Self {
        let tagged = topology.tagged(channel);
        Self {
            stream: format!("{key_prefix}history:{tagged}"),
            top: format!("{key_prefix}history_top:{tagged}"),
            answers: format!("{key_prefix}history_answer:{tagged} "),
            redis_channel: topology.redis_channel(channel),
            publish: topology.publish_command(),
        }
    }

    /// The call that publishes, to be put into a pipeline or invoked; its answer is read by [`parse_published`].
    pub fn publish(
        &self,
        payload: &[u8],
        retention: &Retention,
        random: u64,
        key: Option<&str>,
    ) -> ScriptInvocation<'_> {
        let mut call = self.append(&PUBLISH, retention, random);
        call.arg(payload);
        if let Some(key) = key {
            call.key(format!("{}{key}", self.answers)).arg(IDEMPOTENCY_WINDOW.as_millis() as u64);
        }
        call
    }

    fn append(&self, script: &'static Script, retention: &Retention, random: u64) -> ScriptInvocation<'static> {
        let mut call = script.prepare_invoke();
        call.key(&self.stream).key(&self.top);
        call.arg(retention.size).arg(retention.ttl_ms()).arg(retention.position_ttl_ms()).arg(random_bits(random));
        call.arg(self.publish).arg(&self.redis_channel);
        call
    }

    /// See [`crate::history_store::Chain::mark`].
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn mark(
        &self,
        link: &mut impl ConnectionLike,
        loss: &Loss,
        retention: &Retention,
        random: u64,
    ) -> RedisResult<Marked> {
        let mut call = self.append(&MARK, retention, random);
        call.arg(written(loss.shared)).arg(loss.own.to_string());
        call.arg(loss.passed.iter().map(Cursor::to_string).collect::<Vec<_>>());
        let (what, id): (String, String) = call.invoke_async(link).await?;
        let id = Cursor::parse(&id).ok_or_else(unreadable)?;
        Ok(match what.as_str() {
            "exists" => Marked::Exists,
            "already" => Marked::Already(id),
            _ => Marked::Written(id),
        })
    }

    /// See [`crate::history_store::Chain::read`].
    ///
    /// # Errors
    /// Redis is away, or refuses, or the stream has what no script of ours wrote.
    pub async fn read(
        &self,
        link: &mut impl ConnectionLike,
        unless: Option<Cursor>,
        retention: &Retention,
        random: u64,
    ) -> RedisResult<Window> {
        let mut call = self.reading(&READ, retention, random);
        call.arg(written(unless));
        let (top, entries): (String, Vec<Stored>) = call.invoke_async(link).await?;
        parse_window(&top, entries)
    }

    /// See [`crate::history_store::Chain::read_page`].
    ///
    /// # Errors
    /// As [`Place::read`].
    pub async fn read_page(
        &self,
        link: &mut impl ConnectionLike,
        (range, limit): (Range, usize),
        retention: &Retention,
        random: u64,
    ) -> RedisResult<Window> {
        let mut call = self.reading(&PAGE, retention, random);
        match range {
            Range::After(cursor) => call.arg("after").arg(cursor.to_string()),
            Range::Before(cursor) => call.arg("before").arg(cursor.to_string()),
            Range::Newest => call.arg("before").arg("+"),
        };
        call.arg(limit.min(PAGE_EVENTS_MAX)).arg(REPLY_BYTES_MAX);
        let (top, mut found, first): (String, Vec<Stored>, Vec<Stored>) = call.invoke_async(link).await?;
        if !matches!(range, Range::After(_)) {
            found.reverse();
        }
        parse_window(&top, first.into_iter().chain(found))
    }

    fn reading(&self, script: &'static Script, retention: &Retention, random: u64) -> ScriptInvocation<'static> {
        let mut call = script.prepare_invoke();
        call.key(&self.stream).key(&self.top);
        call.arg(retention.size).arg(retention.ttl_ms()).arg(retention.position_ttl_ms()).arg(random_bits(random));
        call
    }
}

/// Whether the script that publishes has certainly done nothing: Redis did not run it, or refuses what it begins with.
/// Any other error may come from its middle. Keys of the wrong type are found before anything is written: by the `GET`s,
/// or by the `XADD`. An error in a script has its own code since Redis 7; before that it is `ERR`, so not known to be one
/// of these.
pub fn is_refused(error: &RedisError) -> bool {
    let nothing_ran =
        ["NOSCRIPT", "MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "LOADING", "BUSY", "MASTERDOWN", "BADARG"];
    let nothing_is_written = ["READONLY", "OOM", "MISCONF", "NOREPLICAS", "WRONGTYPE"];
    error.code().is_some_and(|code| nothing_ran.contains(&code) || nothing_is_written.contains(&code))
}

/// Reads the answer to a publish: the id, and whether an earlier publish with the same idempotency key was given it.
pub fn parse_published(answer: &Value) -> Option<(Cursor, bool)> {
    let is_repeated = matches!(answer, Value::Array(_));
    let ids: Vec<String> = redis::from_redis_value_ref(answer).ok()?;
    Some((Cursor::parse(ids.first()?)?, is_repeated))
}

/// Whether a message on a Redis channel is one of history: it begins with [`MAGIC`].
pub fn is_envelope(message: &[u8]) -> bool {
    message.starts_with(MAGIC)
}

/// Reads a message that begins with [`MAGIC`]; the payload is not copied. `None` if it is not of this format.
pub fn parse_envelope(message: &Bytes) -> Option<Entry> {
    let mut words = message.strip_prefix(MAGIC)?.splitn(4, |byte| *byte == b' ');
    let (kind, id, previous, content) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let content = match kind {
        b"e" => Content::Event(message.slice_ref(content)),
        b"m" => Content::Marker(parse_shared(content)?),
        _ => return None,
    };
    Some(Entry { id: Cursor::parse_bytes(id)?, previous: Cursor::parse_bytes(previous)?, content })
}

/// An entry as the stream has it: the id, then `p`, the predecessor, `e` or `m`, and the content; what a newer build may
/// put behind that is ignored.
type Stored = (String, Vec<Vec<u8>>);

fn parse_window(top: &str, entries: impl IntoIterator<Item = Stored>) -> RedisResult<Window> {
    let entries = entries.into_iter().map(parse_stored).collect::<Option<_>>();
    match (Cursor::parse(top), entries) {
        (Some(top), Some(entries)) => Ok(Window { entries, top }),
        _ => Err(unreadable()),
    }
}

fn parse_stored((id, fields): Stored) -> Option<Entry> {
    let mut fields = fields.into_iter().skip(1);
    let (previous, kind, content) = (fields.next()?, fields.next()?, fields.next()?);
    let content = match kind.as_slice() {
        b"e" => Content::Event(content.into()),
        b"m" => Content::Marker(parse_shared(&content)?),
        _ => return None,
    };
    Some(Entry { id: Cursor::parse(&id)?, previous: Cursor::parse_bytes(&previous)?, content })
}

fn written(id: Option<Cursor>) -> String {
    id.map_or_else(|| "-".to_owned(), |id| id.to_string())
}

fn parse_shared(text: &[u8]) -> Option<Option<Cursor>> {
    if text == b"-" { Some(None) } else { Cursor::parse_bytes(text).map(Some) }
}

fn unreadable() -> RedisError {
    (ErrorKind::UnexpectedReturnType, "the history is not in our format").into()
}
