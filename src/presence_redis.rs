//! Presence at Redis: the three operations of `presence_store.rs` as scripts, so that all instances share one list.
//!
//! Keys, after `HUBCAST_REDIS_KEY_PREFIX`:
//! - `presence:{channel}` and `presence_users:{channel}`: sorted sets, members and users as described there, on the
//!   channel's server (in a cluster with the hash tag of its partition, as `presence:{17}:{channel}` with real braces);
//! - `presence_of:{instance_id}`: `channel member` for each connection that the instance may have put into a list,
//!   written before and removed after; whoever sweeps up after a dead instance goes through it;
//! - `presence_swept:{instance_id}`: somebody did, so what the instance announced is not true any more.
//!
//! A script checks and changes first and publishes last: scripts do not roll back.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, RedisResult, Script};

use crate::commands::Commands;
use crate::presence_store::{Change, MAGIC, Member, Page};
use crate::servers::Servers;
use crate::topology::Topology;

/// Entries of one script call: Redis does nothing else meanwhile.
pub const SCRIPT_ENTRIES_MAX: usize = 100;

/// Entries of the index that are taken or written at once.
const INDEX_ENTRIES: usize = 500;

/// How long an instance that was swept up can find out. The key is small, and instance ids do not come again.
const SWEPT_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// A sweep of presence ends after this share of a channel's lifetime, a tenth of a lease, and goes on the next time.
const SWEEP_SHARE: u32 = 40;

/// What all scripts begin with: what a [`Place`] is, and the words that the rest is told in.
const PRELUDE: &str = r"
local members, users = KEYS[1], KEYS[2]
local ttl, publish, channel, magic = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local function has(identity)
    return redis.call('ZLEXCOUNT', members, '[' .. identity .. '\0', '(' .. identity .. '\1') > 0
end
local function now()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function finish(kind, identities)
    redis.call('PEXPIRE', members, ttl)
    redis.call('PEXPIRE', users, ttl)
    for _, identity in ipairs(identities) do
        redis.call(publish, channel, magic .. cjson.encode({[kind] = identity}))
    end
end
";

/// After the place, for each entry: identity, connection, whether it is announced.
static JOIN: LazyLock<Script> = LazyLock::new(|| {
    script(
        r"
local joined = {}
for i = 5, #ARGV, 3 do
    local identity = ARGV[i]
    redis.call('ZADD', members, 0, identity .. '\0' .. ARGV[i + 1])
    if ARGV[i + 2] == '0' and not redis.call('ZSCORE', users, identity) then
        table.insert(joined, identity)
    end
    redis.call('ZADD', users, 0, identity)
end
finish('join', joined)
return #joined
",
    )
});

/// After the place and the debounce, the same. Answers for each how many milliseconds are left until it must be settled.
static LEAVE: LazyLock<Script> = LazyLock::new(|| {
    script(
        r"
local now, answer = now(), {}
for i = 6, #ARGV, 3 do
    local identity = ARGV[i]
    redis.call('ZREM', members, identity .. '\0' .. ARGV[i + 1])
    local before = redis.call('ZSCORE', users, identity)
    local wait = 0
    if not has(identity) and (before or ARGV[i + 2] == '1') then
        local due = tonumber(before or 0)
        if due == 0 then
            due = now + tonumber(ARGV[5])
        end
        redis.call('ZADD', users, due, identity)
        wait = math.max(due - now, 1)
    end
    table.insert(answer, wait)
end
finish('leave', {})
return answer
",
    )
});

/// After the place: identities. Answers for each how many milliseconds are left.
static SETTLE: LazyLock<Script> = LazyLock::new(|| {
    script(
        r"
local now, left, answer = now(), {}, {}
for i = 5, #ARGV do
    local identity = ARGV[i]
    local due, wait = tonumber(redis.call('ZSCORE', users, identity) or 0), 0
    if due > now then
        wait = due - now
    elseif due > 0 and has(identity) then
        redis.call('ZADD', users, 0, identity)
    elseif due > 0 then
        redis.call('ZREM', users, identity)
        table.insert(left, identity)
    end
    table.insert(answer, wait)
end
finish('leave', left)
return answer
",
    )
});

/// Arguments: the lower bound of a page, and its limit. One moment for counts and members.
static PAGE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local page = {}
if tonumber(ARGV[2]) > 0 then
    page = redis.call('ZRANGEBYLEX', KEYS[1], ARGV[1], '+', 'LIMIT', 0, ARGV[2])
end
return {redis.call('ZCOUNT', KEYS[2], 0, 0), redis.call('ZCARD', KEYS[1]), page}
",
    )
});

fn script(body: &str) -> Script {
    Script::new(&format!("{PRELUDE}{body}"))
}

/// Where a channel's presence is: everything that depends on how Redis is set up.
#[derive(Clone, Debug)]
pub struct Place {
    /// Key of the members.
    pub members: String,
    /// Key of the users.
    pub users: String,
    /// Where events are published: where the channel's publications are.
    pub redis_channel: String,
    /// And by which command.
    pub publish: &'static str,
}

/// What presence needs to know of Redis.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `HUBCAST_REDIS_KEY_PREFIX`
    pub key_prefix: Box<str>,
    /// How long a channel's presence lives without being renewed.
    pub ttl: Duration,
}

impl Settings {
    /// The place of a channel.
    pub fn place(&self, channel: &str, topology: &Topology) -> Place {
        let tagged = topology.tagged(channel);
        Place {
            members: format!("{}presence:{tagged}", self.key_prefix),
            users: format!("{}presence_users:{tagged}", self.key_prefix),
            redis_channel: topology.redis_channel(channel),
            publish: topology.publish_command(),
        }
    }

    fn index(&self, instance_id: &str) -> String {
        format!("{}presence_of:{instance_id}", self.key_prefix)
    }

    fn swept(&self, instance_id: &str) -> String {
        format!("{}presence_swept:{instance_id}", self.key_prefix)
    }
}

/// The store of instances that are one.
#[derive(Clone, Debug)]
pub struct RedisStore {
    settings: Settings,
    servers: Arc<Servers>,
}

/// There is no link to Redis.
fn away() -> redis::RedisError {
    std::io::Error::from(std::io::ErrorKind::NotConnected).into()
}

impl RedisStore {
    /// The store on the servers that have the channels.
    pub fn new(settings: Settings, servers: Arc<Servers>) -> Self {
        Self { settings, servers }
    }

    /// The servers.
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    /// The link to the server that has a channel.
    fn commands(&self, channel: &str) -> RedisResult<MultiplexedConnection> {
        self.servers.commands(channel).ok_or_else(away)
    }

    /// Connections are here; joins are published.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn join(&self, channel: &str, changes: &[Change]) -> RedisResult<()> {
        self.call::<u64>(&JOIN, channel, entries(changes)).await.map(drop)
    }

    /// Connections are gone. Returns for each how many milliseconds are left until it must be settled; 0: it need not.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn leave(&self, channel: &str, changes: &[Change], debounce_ms: u64) -> RedisResult<Vec<u64>> {
        let mut arguments = vec![debounce_ms.to_string()];
        arguments.extend(entries(changes));
        self.call(&LEAVE, channel, arguments).await
    }

    /// Publishes the leaves that are due. Returns for each how many milliseconds are left; 0: nothing is left to do.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn settle(&self, channel: &str, identities: &[&str]) -> RedisResult<Vec<u64>> {
        self.call(&SETTLE, channel, identities.iter().map(|identity| (*identity).to_owned()).collect()).await
    }

    async fn call<T: FromRedisValue>(&self, script: &Script, channel: &str, arguments: Vec<String>) -> RedisResult<T> {
        let mut link = self.commands(channel)?;
        let place = self.settings.place(channel, &self.servers.topology);
        let ttl_ms = self.settings.ttl.as_millis() as u64;
        let mut call = script.prepare_invoke();
        call.key(place.members).key(place.users);
        call.arg(ttl_ms).arg(place.publish).arg(place.redis_channel).arg(MAGIC).arg(arguments);
        call.invoke_async(&mut link).await
    }

    /// The counts, and up to `limit` members after `after`.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn page(&self, channel: &str, after: Option<&Member>, limit: usize) -> RedisResult<Page> {
        let mut link = self.commands(channel)?;
        let place = self.settings.place(channel, &self.servers.topology);
        let from = after.map_or_else(|| "-".to_owned(), |member| format!("({}", member.as_str()));
        let mut call = PAGE.prepare_invoke();
        call.key(place.members).key(place.users).arg(from).arg(limit);
        let (users, connections, members): (usize, usize, Vec<String>) = call.invoke_async(&mut link).await?;
        let members = members.iter().filter_map(|text| Member::parse(text)).collect();
        Ok(Page { users, connections, members })
    }

    /// Notes in the index of an instance what it is about to put into lists, and keeps the index alive.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn index(&self, link: &mut Commands, instance_id: &str, entries: &[(&str, &Member)]) -> RedisResult<()> {
        let index = self.settings.index(instance_id);
        for batch in entries.chunks(INDEX_ENTRIES) {
            let mut pipeline = redis::pipe();
            pipeline.sadd(&index, index_entries(batch)).ignore();
            pipeline.cmd("PEXPIRE").arg(&index).arg(self.settings.ttl.as_millis() as u64).ignore();
            pipeline.exec_async(link).await?;
        }
        Ok(())
    }

    /// Removes from the index what is in no list any more.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn unindex(
        &self,
        link: &mut Commands,
        instance_id: &str,
        entries: &[(&str, &Member)],
    ) -> RedisResult<()> {
        let index = self.settings.index(instance_id);
        for batch in entries.chunks(INDEX_ENTRIES) {
            redis::cmd("SREM").arg(&index).arg(index_entries(batch)).exec_async(link).await?;
        }
        Ok(())
    }

    /// A part of an instance's index from a cursor (0 at first), and the next cursor (0 at the end).
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn indexed(
        &self,
        link: &mut Commands,
        instance_id: &str,
        cursor: u64,
    ) -> RedisResult<(u64, Vec<(String, Member)>)> {
        let mut scan = redis::cmd("SSCAN");
        scan.arg(self.settings.index(instance_id)).arg(cursor).arg("COUNT").arg(INDEX_ENTRIES);
        let (next, found): (u64, Vec<String>) = scan.query_async(link).await?;
        Ok((next, found.iter().filter_map(|entry| parse_entry(entry)).collect()))
    }

    /// Whether another instance swept up after this one.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn was_swept(&self, link: &mut Commands, instance_id: &str) -> RedisResult<bool> {
        redis::cmd("EXISTS").arg(self.settings.swept(instance_id)).query_async(link).await
    }

    /// This instance has noted that it was swept up.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn forget_swept(&self, link: &mut Commands, instance_id: &str) -> RedisResult<()> {
        redis::cmd("UNLINK").arg(self.settings.swept(instance_id)).exec_async(link).await
    }

    /// Takes the connections of a dead instance out of the lists and announces the leaves that are due. What is not
    /// due (its clients were told to come back), or on a server that is away, stays for the next sweep, and so does
    /// what would take too long: the sweeper has its own lease to renew. True if nothing has to stay.
    ///
    /// # Errors
    /// Redis is away, or refuses.
    pub async fn sweep_up(&self, link: &mut Commands, instance_id: &str, instance_key: &str) -> RedisResult<bool> {
        let index = self.settings.index(instance_id);
        let started = Instant::now();
        loop {
            let (found, is_alive): (Vec<String>, bool) = redis::pipe()
                .cmd("SRANDMEMBER")
                .arg(&index)
                .arg(INDEX_ENTRIES)
                .exists(instance_key)
                .query_async(link)
                .await?;
            // Not dead after all: once it is forgotten it writes everything anew.
            if found.is_empty() || is_alive {
                return Ok(true);
            }
            let ttl_ms = self.settings.ttl.as_millis() as u64;
            self.mark_swept(link, instance_id).await?;
            let gone = self.sweep_batch(&found).await;
            // If it came back meanwhile, it may have taken the mark already.
            self.mark_swept(link, instance_id).await?;
            let must_wait = gone.is_empty() || started.elapsed() > self.settings.ttl / SWEEP_SHARE;
            if !gone.is_empty() {
                redis::cmd("SREM").arg(&index).arg(gone).exec_async(link).await?;
            }
            if must_wait {
                redis::cmd("PEXPIRE").arg(&index).arg(ttl_ms).exec_async(link).await?;
                return Ok(false);
            }
        }
    }

    async fn mark_swept(&self, link: &mut Commands, instance_id: &str) -> RedisResult<()> {
        let (swept, ttl_ms) = (self.settings.swept(instance_id), SWEPT_TTL.as_millis() as u64);
        redis::cmd("SET").arg(swept).arg(1).arg("PX").arg(ttl_ms).exec_async(link).await
    }

    /// Leaves for a batch of index entries, all channels side by side; returns those that are done with.
    async fn sweep_batch<'a>(&self, found: &'a [String]) -> Vec<&'a str> {
        let mut gone = Vec::new();
        let mut by_channel = BTreeMap::<_, Vec<_>>::new();
        for entry in found {
            match parse_entry(entry) {
                Some((channel, member)) => by_channel.entry(channel).or_default().push((entry.as_str(), member)),
                None => gone.push(entry.as_str()),
            }
        }
        let swept = by_channel.iter().map(|(channel, entries)| self.sweep_channel(channel, entries));
        // What is on a server that is away has its turn in another sweep.
        gone.extend(join_all(swept).await.into_iter().flat_map(Result::unwrap_or_default));
        gone
    }

    async fn sweep_channel<'a>(&self, channel: &str, entries: &[(&'a str, Member)]) -> RedisResult<Vec<&'a str>> {
        let mut gone = Vec::new();
        for entries in entries.chunks(SCRIPT_ENTRIES_MAX) {
            // If its list does not know it, it never joined, or was settled.
            let leave = |(_, member): &(_, Member)| Change { member: member.clone(), is_announced: false };
            let changes: Vec<_> = entries.iter().map(leave).collect();
            self.leave(channel, &changes, 0).await?;
            let identities: Vec<_> = changes.iter().map(|change| change.member.identity()).collect();
            let left_ms = self.settle(channel, &identities).await?;
            gone.extend(entries.iter().zip(left_ms).filter(|(_, left)| *left == 0).map(|((entry, _), _)| *entry));
        }
        Ok(gone)
    }
}

fn entries(changes: &[Change]) -> Vec<String> {
    let entry = |Change { member, is_announced }: &Change| {
        [member.identity().to_owned(), member.connection_id().to_owned(), u8::from(*is_announced).to_string()]
    };
    changes.iter().flat_map(entry).collect()
}

/// Channel names have no space.
fn index_entries(entries: &[(&str, &Member)]) -> Vec<String> {
    entries.iter().map(|(channel, member)| format!("{channel} {}", member.as_str())).collect()
}

fn parse_entry(entry: &str) -> Option<(String, Member)> {
    let (channel, member) = entry.split_once(' ')?;
    Some((channel.to_owned(), Member::parse(member)?))
}
