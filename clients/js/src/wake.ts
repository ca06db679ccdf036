// When a page is looked at again, or the network is back. Node has no such thing.

/** Returns what stops it. */
export function onWake(callback: () => void): () => void {
  const page = globalThis.document as Document | undefined;
  const network = page && globalThis.window;
  const seen = () => {
    if (page?.visibilityState === "visible") callback();
  };
  page?.addEventListener("visibilitychange", seen);
  network?.addEventListener("online", callback);
  return () => {
    page?.removeEventListener("visibilitychange", seen);
    network?.removeEventListener("online", callback);
  };
}
