// A gateway that wants tokens, and clients that have them.

import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import type { Client } from "../../src/index.js";
import { becomes, client, live, told, WEBSOCKETS } from "./gateway.js";
import { guarded, nowS, token } from "./issuer.js";

const RULES = JSON.stringify([{ match: "*", history: { size: 100, ttl: "10m" } }]);

/** All its states from now on. */
function states(hubcast: Client): string[] {
  const all: string[] = [];
  hubcast.on("status", ({ state }) => all.push(state));
  return all;
}

for (const [name, WebSocket] of WEBSOCKETS) {
  for (const tokenIn of ["query", "command"] as const) {
    test(`a token by ${tokenIn}: who it is, and what it may (${name})`, async (t) => {
      const gateway = await guarded(t);
      const getToken = () => token({ sub: "alice", subscribe: ["news"] });
      const hubcast = client(t, gateway.url, { WebSocket, getToken, tokenIn });
      await live(hubcast, "news");
      const secret = hubcast.subscribe("secret");
      const refused = told(secret, "error");
      assert.equal((await refused).code, "forbidden");
      assert.deepEqual(await gateway.post("disconnect", { user: "alice" }), { disconnected: 1 });
    });
  }

  test(`a cached token that is over is asked for anew, though the handshake does not say so (${name})`, async (t) => {
    const gateway = await guarded(t);
    const requests: boolean[] = [];
    const getToken = ({ isRefused }: { isRefused: boolean }) => {
      requests.push(isRefused);
      return token({ sub: "alice", ...(!isRefused && { exp: nowS() - 1 }) });
    };
    const hubcast = client(t, gateway.url, { WebSocket, getToken });
    await becomes(hubcast, "open");
    assert.deepEqual(requests, [false, false, true]);
    assert.equal(hubcast.status.state, "open");
  });

  test(`a token is refreshed on the live connection: nothing is lost when the first one ends (${name})`, async (t) => {
    const gateway = await guarded(t);
    const requests: boolean[] = [];
    const firstEnd = nowS() + 4;
    const getToken = ({ isRefused }: { isRefused: boolean }) => {
      requests.push(isRefused);
      return token({ sub: "alice", subscribe: ["news"], ...(requests.length === 1 && { exp: firstEnd }) });
    };
    const hubcast = client(t, gateway.url, { WebSocket, getToken });
    const all = states(hubcast);
    const { data } = await live(hubcast, "news");
    let n = 0;
    for (; nowS() < firstEnd + 2; n += 1) {
      await gateway.publish("news", `${n}`);
      await sleep(50);
    }
    await hubcast.ping();
    assert.deepEqual(data, [...Array(n).keys()]);
    assert.deepEqual(requests, [false, false]);
    assert.deepEqual(all, ["open"], "the first connection is the only one");
  });

  test(`a channel's token that expires is renewed, and nothing is missed (${name})`, async (t) => {
    const gateway = await guarded(t, { HUBCAST_CHANNEL_RULES: RULES });
    const hubcast = client(t, gateway.url, { WebSocket, getToken: () => token({ sub: "alice" }) });
    const all = states(hubcast);
    const requests: boolean[] = [];
    const room = hubcast.subscribe("room", {
      token: async ({ isRefused }) => {
        requests.push(isRefused);
        // Published while nobody listens.
        if (isRefused) await gateway.publish("room", "1");
        const exp = nowS() + (isRefused ? 60 : 2);
        return token({ sub: "alice", subscribe: ["room"], exp });
      },
    });
    const data: unknown[] = [];
    room.on("publication", (publication) => data.push(publication.data));
    room.on("unsubscribed", ({ reason }) => data.push(reason));
    await told(room, "subscribed");
    await gateway.publish("room", "0");
    assert.equal((await told(room, "subscribed")).recovered, true);
    await gateway.publish("room", "2");
    while (data.length < 3) await told(room, "publication");
    assert.deepEqual(data, [0, 1, 2]);
    assert.deepEqual(requests, [false, true]);
    assert.deepEqual(all, ["open"]);
  });

  test(`a user that is revoked comes back with a new token (${name})`, async (t) => {
    const gateway = await guarded(t);
    const requests: boolean[] = [];
    const getToken = ({ isRefused }: { isRefused: boolean }) => {
      requests.push(isRefused);
      return token({ sub: "alice", subscribe: ["news"], iat: nowS() });
    };
    // The default: of the second in which a user is revoked, new tokens are refused as well.
    const backoff = { baseMs: 1_000, maxMs: 20_000 };
    const hubcast = client(t, gateway.url, { WebSocket, getToken, backoff });
    const { subscription } = await live(hubcast, "news");
    const closed = becomes(hubcast, "closed");
    const resumed = told(subscription, "subscribed");
    assert.deepEqual(await gateway.post("revoke", { user: "alice" }), { disconnected: 1 });
    const { code, reason } = await closed;
    assert.deepEqual([code, reason], [3000, "token revoked"]);
    await resumed;
    assert.deepEqual(requests, [false, true]);
  });
}

test("a user that is revoked and has no new token does not hammer", async (t) => {
  const gateway = await guarded(t);
  const old = token({ sub: "alice", iat: nowS() - 10 });
  const requests: boolean[] = [];
  const getToken = ({ isRefused }: { isRefused: boolean }) => {
    requests.push(isRefused);
    return old;
  };
  const hubcast = client(t, gateway.url, { getToken });
  await becomes(hubcast, "open");
  const final = new Promise<number>((resolve) => {
    hubcast.on(
      "status",
      (status) => status.state === "closed" && status.retryInMs === null && resolve(status.code),
    );
  });
  await gateway.post("revoke", { user: "alice" });
  assert.equal(await final, 3000);
  assert.deepEqual(requests, [false, true, true], "by query, which says nothing, then by command");
});

test("a channel's token that is refused is asked for once anew", async (t) => {
  const gateway = await guarded(t);
  const hubcast = client(t, gateway.url, { getToken: () => token({ sub: "alice" }) });
  const requests: boolean[] = [];
  const room = hubcast.subscribe("room", {
    token: ({ isRefused }) => {
      requests.push(isRefused);
      return token({ sub: isRefused ? "alice" : "bob", subscribe: ["room"] });
    },
  });
  await told(room, "subscribed");
  assert.deepEqual(requests, [false, true]);
  const never = hubcast.subscribe("never", { token: () => token({ subscribe: ["room"] }) });
  never.on("error", () => {});
  assert.deepEqual(await told(never, "unsubscribed"), { reason: "forbidden" });
});

test("a token that is only text ends with its subscription", async (t) => {
  const gateway = await guarded(t);
  const hubcast = client(t, gateway.url, { getToken: () => token({ sub: "alice" }) });
  const room = hubcast.subscribe("room", { token: token({ subscribe: ["room"], exp: nowS() + 2 }) });
  await told(room, "subscribed");
  assert.deepEqual(await told(room, "unsubscribed"), { reason: "token_expired" });
  assert.equal(room.state, "unsubscribed");
});
