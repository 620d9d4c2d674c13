// Search runs in a worker, and no browser starts one from a folder (file://). There it runs in a
// hidden frame of the page instead, which has the two functions that a worker would have.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    this.inside = this.frame.contentWindow;
    this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
    this.inside.importScripts = (...urls) => Promise.all(urls.map((one) => this.load(one)));
    this.loaded = this.load(url);
  }
  load(url) {
    const script = this.inside.document.createElement("script");
    script.src = url;
    this.inside.document.body.append(script);
    return new Promise((resolve) => script.addEventListener("load", resolve));
  }
  async postMessage(data) {
    await this.loaded;
    this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }));
  }
  terminate() {
    this.frame.remove();
  }
}
if (location.protocol === "file:") window.Worker = FrameWorker;
