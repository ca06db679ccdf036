// Code of the application, called where a throw must not stop the client.

/** What it throws is reported as uncaught, like that of any event listener. */
export function guarded<Result>(call: () => Result, otherwise: Result): Result {
  try {
    return call();
  } catch (error) {
    queueMicrotask(() => {
      throw error;
    });
    return otherwise;
  }
}
