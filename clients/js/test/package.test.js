// What is built, as whoever installs it gets it.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { gzipSync } from "node:zlib";
import * as modules from "@hubcast/client";
import * as bundle from "@hubcast/client/hubcast.min.js";

test("the modules and the one file export the same", () => {
  assert.deepEqual(Object.keys(modules).sort(), ["Client", "HubcastError", "comesBack"]);
  assert.deepEqual(Object.keys(bundle).sort(), Object.keys(modules).sort());
});

test("no dependencies, and small: a page loads it before anything else", () => {
  const manifest = JSON.parse(readFileSync(new URL("../package.json", import.meta.url), "utf8"));
  assert.equal(manifest.dependencies, undefined);
  const bytes = gzipSync(readFileSync(new URL("../dist/hubcast.min.js", import.meta.url)), {
    level: 9,
  }).length;
  assert.ok(bytes <= 6_000, `${bytes} bytes`);
});
