// Who signs tokens: a gateway that takes them, and what it takes.

import { createHmac } from "node:crypto";
import type { TestContext } from "node:test";
import { Gateway } from "./gateway.js";

const SECRET = "a secret of the tests, 32 bytes and more";

/** A gateway that wants tokens. */
export function guarded(test: TestContext, env: Record<string, string> = {}): Promise<Gateway> {
  return Gateway.start(test, { HUBCAST_AUTH: "jwt", HUBCAST_JWT_SECRET: SECRET, ...env });
}

export interface Claims {
  sub?: string;
  subscribe?: string[];
  /** Good for a minute where nothing is said. */
  exp?: number;
  iat?: number;
}

/** In seconds since 1970, as tokens have it. */
export function nowS(): number {
  return Math.floor(Date.now() / 1_000);
}

export function token(claims: Claims): string {
  const part = (value: object) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const signed = `${part({ alg: "HS256", typ: "JWT" })}.${part({ exp: nowS() + 60, ...claims })}`;
  return `${signed}.${createHmac("sha256", SECRET).update(signed).digest("base64url")}`;
}
