// Browsers start no worker from file://, where the search lives; this runs the theme's search in a hidden frame instead.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.appendChild(frame);
    const inside = this.inside = frame.contentWindow;
    inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}));
    inside.importScripts = (...urls) => urls.reduce((before, src) => before.then(() => this.load(new URL(src, url))), Promise.resolve());
    this.ready = this.load(url);
  }
  load(src) {
    const document = this.inside.document;
    return new Promise((onload, onerror) => document.body.appendChild(Object.assign(document.createElement("script"), {src, onload, onerror})));
  }
  postMessage(data) { this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data}))); }
  terminate() { this.inside.frameElement.remove(); }
};
