// Instances that go away, and clients that come back.

import assert from "node:assert/strict";
import { test } from "node:test";
import { WebSocket } from "ws";
import { becomes, client, Gateway, live, told, WEBSOCKETS } from "./gateway.js";

for (const [name, WebSocket] of WEBSOCKETS) {
  test(`SIGTERM: everything accepted arrives, then all resume at the next instance (${name})`, async (t) => {
    const drained = await Gateway.start(t, { HUBCAST_DRAIN_TIME: "500ms" });
    const next = await Gateway.start(t);
    const clients = Array.from({ length: 20 }, () => client(t, [drained.url, next.url], { WebSocket }));
    const all = await Promise.all(clients.map((hubcast) => live(hubcast, "news")));
    for (let n = 0; n < 10; n += 1) await drained.publish("news", `${n}`);
    const draining = Promise.all(clients.map((hubcast) => becomes(hubcast, "draining")));
    const closed = Promise.all(clients.map((hubcast) => becomes(hubcast, "closed")));
    const resumed = Promise.all(all.map(({ subscription }) => told(subscription, "subscribed")));
    drained.signal("SIGTERM");
    for (const { retryAfterMs } of await draining) assert.equal(retryAfterMs, 500);
    for (const { code, retryInMs } of await closed) {
      assert.equal(code, 1012);
      assert.ok(retryInMs !== null && retryInMs >= 0 && retryInMs <= 500, `${retryInMs}`);
    }
    for (const { data } of all) assert.deepEqual(data, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    for (const { recovered } of await resumed) assert.equal(recovered, false, "there is no history");
    assert.equal(await drained.end(), 0);
    const arrived = Promise.all(all.map(({ subscription }) => told(subscription, "publication")));
    await next.publish("news", "10");
    for (const { data } of await arrived) assert.equal(data, 10);
  });

  test(`an instance that is killed: lost, tried in vain, back at the next (${name})`, async (t) => {
    const killed = await Gateway.start(t);
    const urls = [killed.url, "ws://127.0.0.1:1/ws"];
    const hubcast = client(t, (attempt) => urls[attempt % urls.length] as string, { WebSocket });
    const { subscription } = await live(hubcast, "news");
    const lost = becomes(hubcast, "closed");
    killed.signal("SIGKILL");
    assert.equal((await lost).code, 1006);
    const inVain = await becomes(hubcast, "closed");
    assert.equal(inVain.code, 1006);
    const next = await Gateway.start(t);
    urls.splice(0, 2, next.url);
    assert.deepEqual(await told(subscription, "subscribed"), { recovered: false, cursor: undefined });
  });
}

test("a publish on its way when the instance dies has an unknown outcome", async (t) => {
  const gateway = await Gateway.start(t);
  const hubcast = client(t, gateway.url);
  await becomes(hubcast, "open");
  const publish = hubcast.publish("news", 1);
  gateway.signal("SIGKILL");
  // It may have been answered before the signal came.
  await publish.then(
    (answer) => assert.deepEqual(answer, {}),
    (error) => assert.deepEqual([error.code, error.outcome], ["disconnected", "unknown"]),
  );
});

test("a slow consumer is closed with 4101, backs off, and resumes", async (t) => {
  // Small bounds, so that little has to be published until the socket's own buffers are full.
  const gateway = await Gateway.start(t, { HUBCAST_OUTBOX_BYTES: "64KiB" });
  const sockets: WebSocket[] = [];
  class Observed extends WebSocket {
    constructor(url: string, protocols: string) {
      super(url, protocols);
      sockets.push(this);
    }
  }
  const hubcast = client(t, gateway.url, { WebSocket: Observed });
  const { subscription } = await live(hubcast, "flood");
  const closed = becomes(hubcast, "closed");
  sockets[0]?.pause();
  let isFlooding = true;
  const flooding = (async () => {
    const payload = JSON.stringify("x".repeat(200_000));
    while (isFlooding) await gateway.publish("flood", payload);
  })();
  await gateway.counted('hubcast_dropped_total{reason="slow_consumer"}');
  sockets[0]?.resume();
  isFlooding = false;
  await flooding;
  const { code, retryInMs } = await closed;
  assert.equal(code, 4101);
  assert.ok(retryInMs !== null && retryInMs >= 20, "it backs off");
  await told(subscription, "subscribed");
  const arrived = told(subscription, "publication");
  await gateway.publish("flood", "1");
  assert.equal((await arrived).data, 1);
});
