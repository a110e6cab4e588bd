"""ComfyUI's front end in a browser tab, driven as a user drives it: its templates, its Run button, its canvas.

What no button shows (the graph's links, a node's error stroke) is read from `window.app`, the object that the front end
itself gives to extensions.
"""

import base64
import json
import re
import time
import urllib.request
from pathlib import Path

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WINDOW = {"width": 1920, "height": 1080}
# The schema check is off by default. A first visit would open the Templates dialog over the canvas, and
# the side panel stays open once a test has opened it.
SETTINGS = {
    "Comfy.Validation.Workflows": True,
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.VueNodes.Enabled": False,
}
NOT_FOUND = "Failed to load resource: the server responded with a status of 404 (Not Found)"
# A fresh profile shows ComfyUI's own first graph; it asks for the sizes of two models there, which its page forbids.
FIRST_GRAPH_MODELS = tuple(
    f"https://huggingface.co/Comfy-Org/z_image_turbo/resolve/main/split_files/{name}.safetensors"
    for name in ("text_encoders/qwen_3_4b", "diffusion_models/z_image_turbo_bf16")
)
# Template 8 names what has to be downloaded, and the front end asks for the files' sizes.
TEMPLATE_MODELS = tuple(
    f"https://huggingface.co/{name}.safetensors"
    for name in (
        "PixArt-alpha/PixArt-XL-2-512x512/resolve/main/transformer/diffusion_pytorch_model",
        "PixArt-alpha/PixArt-XL-2-512x512/resolve/main/vae/diffusion_pytorch_model",
        "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16",
    )
)
FORBIDDEN = (
    "Connecting to '{}' violates the following Content Security Policy directive: \"connect-src 'self' data:\". "
    "The action has been blocked.",
    "Fetch API cannot load {}. Refused to connect because it violates the document's Content Security Policy.",
)
# Console errors of ComfyUI itself: the exact text, what its address must match, and why it is no fault of the pack.
KNOWN_ERRORS = (
    (NOT_FOUND, r"/user\.css$", "a fresh profile has no style sheet of the user"),
    (NOT_FOUND, r"/api/userdata\?dir=(workflows|subgraphs)&", "a fresh profile has no saved workflows and blueprints"),
    (NOT_FOUND, r"/api/userdata/comfy\.templates\.json$", "a fresh profile has no saved node templates"),
    ("ComfyApp graph accessed before initialization", r"/assets/settingStore-", "the front end does so as it starts"),
    *(
        (text.format(model), r"/assets/missingModelDownload-", "sizes of missing models, which it may not ask for")
        for model in (*FIRST_GRAPH_MODELS, *TEMPLATE_MODELS)
        for text in FORBIDDEN
    ),
    (NOT_FOUND, r"/docs/\w+/en\.md$", "the help of a node is asked for in the language first, then without one"),
)
# The page can be used when its first graph is there (the default one, or the one that was open) and nothing covers it.
READY = """window.app?.vueAppReady && app.extensionManager && app.graph._nodes.length > 0
  && !document.querySelector('.p-blockui-mask')"""
# Widgets that only show results are no part of what a workflow says.
GRAPH = """() => ({
  nodes: app.graph._nodes.map(n => [String(n.id), n.type, n.title, n.mode, Object.fromEntries((n.widgets || [])
    .filter(w => w.serialize !== false && w.options?.serialize !== false && n.type !== 'PreviewAny')
    .map(w => [w.name, w.value]))]).sort((a, b) => a[0] < b[0] ? -1 : 1),
  links: [...app.graph.links.values()]
    .map(l => [app.graph.getNodeById(l.origin_id), app.graph.getNodeById(l.target_id), l])
    .map(([a, b, l]) => `${a.id}.${a.outputs[l.origin_slot].name} ${b.id}.${b.inputs[l.target_slot].name}`).sort(),
})"""
DROP = """([name, type, content]) => {
  const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, {type}));
  const canvas = document.querySelector('#graph-canvas');
  const where = {bubbles: true, cancelable: true, dataTransfer: data, clientX: 960, clientY: 900};
  for (const kind of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(kind, where));
}"""
TYPES = {".json": "application/json", ".png": "image/png"}


def set_settings(address: str, settings: dict = SETTINGS) -> None:
    """Give the server its settings: it keeps them for all browsers, with what a test before changed."""
    body = json.dumps(settings).encode()
    request = urllib.request.Request(address + "/api/settings", body, {"Content-Type": "application/json"})
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()


class FrontEnd:
    """One tab with the front end of the server at `address`; pictures of it go to the folder `pictures`."""

    def __init__(self, page, address: str, pictures: Path):
        self.page, self.address, self.pictures = page, address, pictures
        self._errors: list[tuple[str, str]] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self._errors.append((str(error), page.url)))

    def _hear(self, message) -> None:
        if message.type == "error":
            self._errors.append((message.text, message.location.get("url", "")))

    def errors(self) -> list[str]:
        """The console's errors so far, each with its address, without those that are ComfyUI's own."""
        return [
            f"{text} ({url})"
            for text, url in self._errors
            if not any(text == known and re.search(where, url) for known, where, _reason in KNOWN_ERRORS)
        ]

    def start(self) -> None:
        """Load the page and wait until the front end can be used, with an empty graph in it."""
        self.page.goto(self.address, wait_until="domcontentloaded", timeout=120_000)
        self.wait_until_ready()
        self.clear()

    def wait_until_ready(self) -> None:
        self.page.wait_for_function(READY, timeout=120_000)
        self.page.get_by_test_id("queue-button").wait_for(timeout=60_000)

    def clear(self) -> None:
        """A new empty workflow in a tab of its own, as the + beside the tabs makes it."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        self.page.wait_for_function("app.graph._nodes.length === 0")

    def browse_templates(self, pack: str) -> None:
        """Open Templates from the side bar and choose the pack's section under Extensions."""
        self.page.get_by_role("button", name="Templates").first.click()
        self.page.get_by_test_id("template-workflows-content").wait_for()
        self.page.locator("nav").get_by_text(pack, exact=True).click()
        self.page.get_by_test_id("template-workflow-2 Counterfactual pair").wait_for()

    def open_template(self, pack: str, name: str) -> None:
        """Open one of the pack's templates by its card."""
        self.browse_templates(pack)
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.wait_for_graph()

    def wait_for_graph(self) -> None:
        """Wait until a graph is there and the number of its nodes no longer changes."""
        self.page.wait_for_function("app.graph._nodes.length > 0", timeout=30_000)
        count = 0
        while count != (count := self.page.evaluate("app.graph._nodes.length")):
            self.page.wait_for_timeout(500)

    def drop(self, path: Path, load: bool = True) -> None:
        """Drop a file from the disk onto the canvas; with `load`, wait for the graph in it."""
        content = base64.b64encode(path.read_bytes()).decode()
        self.page.evaluate(DROP, [path.name, TYPES[path.suffix], content])
        if load:
            self.wait_for_graph()

    def graph(self) -> dict:
        """The graph on the canvas: nodes with id, type, title, mode and widget values, and links by slot names."""
        return self.page.evaluate(GRAPH)

    def serialized(self) -> dict:
        """What the front end would save: the graph in its workflow format."""
        return json.loads(self.page.evaluate("JSON.stringify(app.graph.serialize())"))

    def api_form(self) -> dict:
        """What the front end would send to the server, and what its Export (API) writes."""
        return json.loads(self.page.evaluate("app.graphToPrompt().then(made => JSON.stringify(made.output))"))

    def missing_types(self) -> list[str]:
        """Types of nodes on the canvas that the server doesn't have."""
        return self.page.evaluate("app.graph._nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])")

    def toasts(self) -> str:
        """The text of the messages that the front end shows over the canvas."""
        return "\n".join(self.page.locator(".p-toast-message").all_inner_texts())

    def run(self, time_limit: float = 240.0) -> dict:
        """Press Run and wait for the end; the history's entry of the run."""
        before = set(self._history())
        self.page.get_by_test_id("queue-button").click()
        begun = time.monotonic()
        while not (new := set(self._history()) - before):
            assert time.monotonic() - begun < time_limit, f"no run ended within {time_limit:.0f} s"
            self.page.wait_for_timeout(200)
        return self._history()[new.pop()]

    def _history(self) -> dict:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.address + "/history") as answer:
            return json.load(answer)

    def show(self, node_type: str, scale: float = 0.8) -> tuple[float, float]:
        """Bring the first node of a type to the upper left; the place of its title in the window, in pixels."""
        return self.page.evaluate(
            """([type, scale]) => {
              const n = app.graph._nodes.find(n => n.type === type), ds = app.canvas.ds;
              ds.scale = scale; ds.offset[0] = 400 / scale - n.pos[0]; ds.offset[1] = 250 / scale - n.pos[1];
              app.canvas.setDirty(true, true);
              const box = app.canvas.canvas.getBoundingClientRect();
              return [box.x + (n.pos[0] + 70 + ds.offset[0]) * scale, box.y + (n.pos[1] - 14 + ds.offset[1]) * scale];
            }""",
            [node_type, scale],
        )

    def picture(self, name: str) -> Path:
        """A screenshot, once what moves has come to rest."""
        self.page.mouse.move(960, 1060)
        self.page.wait_for_timeout(1200)
        path = self.pictures / f"{name}.png"
        self.page.screenshot(path=path)
        return path
