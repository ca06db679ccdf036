// Channels with history: clients that come back miss nothing, and are told nothing twice.

import assert from "node:assert/strict";
import { test } from "node:test";
import { becomes, client, Gateway, live, told, WEBSOCKETS } from "./gateway.js";

const RULES = JSON.stringify([
  { match: "h:*", history: { size: 100, ttl: "10m" }, client_publish: true },
  { match: "price", cache: true },
  { match: "*", client_publish: true },
]);

for (const [name, WebSocket] of WEBSOCKETS) {
  test(`what was published while it was away arrives, once and in order (${name})`, async (t) => {
    const gateway = await Gateway.start(t, { HUBCAST_CHANNEL_RULES: RULES });
    const hubcast = client(t, gateway.url, { WebSocket });
    const { subscription, data } = await live(hubcast, "h:1");
    let n = 0;
    for (let round = 0; round < 5; round += 1) {
      await gateway.publish("h:1", `${n++}`);
      const closed = becomes(hubcast, "closed");
      const resumed = told(subscription, "subscribed");
      const { status } = hubcast;
      assert.equal(status.state, "open");
      // 1013: it waits before it comes back.
      await gateway.post("disconnect", { connection_id: status.connectionId, code: 1013 });
      await closed;
      for (let missed = 0; missed < 10; missed += 1) await gateway.publish("h:1", `${n++}`);
      assert.equal((await resumed).recovered, true);
    }
    const last = new Promise<void>((resolve) => {
      subscription.on("publication", (publication) => publication.data === "end" && resolve());
    });
    await gateway.publish("h:1", '"end"');
    await last;
    assert.deepEqual(data, [...Array(n).keys(), "end"]);
  });
}

test("a gateway that lost its memory says so: reload", async (t) => {
  const killed = await Gateway.start(t, { HUBCAST_CHANNEL_RULES: RULES });
  const urls = [killed.url];
  const hubcast = client(t, () => urls[0] as string);
  const { subscription } = await live(hubcast, "h:1");
  const arrived = told(subscription, "publication");
  await killed.publish("h:1", "1");
  await arrived;
  const resumed = told(subscription, "subscribed");
  killed.signal("SIGKILL");
  urls[0] = (await Gateway.start(t, { HUBCAST_CHANNEL_RULES: RULES })).url;
  const { recovered, cursor } = await resumed;
  assert.equal(recovered, false);
  assert.equal(subscription.cursor, cursor);
});

test("a stored cursor goes on on the next page, and history is paged", async (t) => {
  const gateway = await Gateway.start(t, { HUBCAST_CHANNEL_RULES: RULES });
  const hubcast = client(t, gateway.url);
  await becomes(hubcast, "open");
  const cursors: string[] = [];
  for (let n = 0; n < 5; n += 1) cursors.push((await hubcast.publish("h:1", n)).cursor as string);
  const later = client(t, gateway.url).subscribe("h:1", { after: cursors[2] as string });
  const data: unknown[] = [];
  later.on("publication", (publication) => data.push(publication.data));
  assert.deepEqual(await told(later, "subscribed"), { recovered: true, cursor: cursors[2] });
  const last = told(later, "publication");
  await hubcast.publish("h:1", 5);
  await last;
  while (data.length < 3) await told(later, "publication");
  assert.deepEqual(data, [3, 4, 5]);
  const page = await hubcast.history("h:1", { after: cursors[0] as string, limit: 2 });
  assert.deepEqual([page.publications.map((publication) => publication.data), page.hasMore], [[1, 2], true]);
  await assert.rejects(hubcast.history("plain"), { code: "forbidden", outcome: "refused" });
});

test("a cached channel begins with its last publication", async (t) => {
  const gateway = await Gateway.start(t, { HUBCAST_CHANNEL_RULES: RULES });
  await gateway.publish("price", "41");
  await gateway.publish("price", "42");
  const hubcast = client(t, gateway.url);
  const price = hubcast.subscribe("price");
  const arrived = told(price, "publication");
  assert.equal((await told(price, "subscribed")).recovered, undefined);
  assert.equal((await arrived).data, 42);
});
