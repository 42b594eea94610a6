// Perfetto's trace processor, compiled to WebAssembly for its web page, as a filter in Node:
//   node perfetto_pipe.js FOLDER_OF_ENGINE_BUNDLE < requests > responses
// Both sides are streams of the protobuf message perfetto.protos.TraceProcessorRpcStream.
"use strict";
const fs = require("fs");
const path = require("path");
const { stdin, stdout, argv, exit } = process;
const folder = argv[2];
const bundle = fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8");

// The bundle expects to run in a web worker and to fetch its .wasm file over HTTP.
globalThis.self = globalThis;
globalThis.WorkerGlobalScope = function () {};
globalThis.location = { href: "file://" + folder + "/" };
globalThis.XMLHttpRequest = class {
  open(_method, url) {
    this.file = path.join(folder, path.basename(url));
  }
  send() {
    this.response = new Uint8Array(fs.readFileSync(this.file)).buffer;
  }
};
console.log = console.warn = console.error = () => {};
// With `process` in sight it would take itself for a program of Node, not for a worker.
Object.defineProperty(globalThis, "process", { value: undefined, configurable: true, writable: true });

(0, eval)(bundle);
const responses = [];
const port = { onmessage: null, postMessage: (bytes) => responses.push(Buffer.from(bytes)) };
globalThis.onmessage({ data: port });

const requests = [];
stdin.on("data", (chunk) => requests.push(chunk));
stdin.on("end", () => {
  // The module is compiled by now; what follows from that runs in turns of the event loop.
  setTimeout(() => {
    port.onmessage({ data: new Uint8Array(Buffer.concat(requests)) });
    stdout.write(Buffer.concat(responses), () => exit(0));
  }, 50);
});
