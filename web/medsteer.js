// What a MedSteer node keeps of its run: the text that it shows on itself, and among a vector node's properties how the
// vector was made, so that a shared workflow says it where the file is missing. And what the pack has to say on a node of
// somebody else's while that runs (words that the model does not know, on the node that encodes them).
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NOTE = "medsteer_note";
const RECIPE = "medsteer_recipe";
const MARGIN = 6;
const FIRST_HEIGHT = 24; // pixels, until the text is drawn: at a low zoom the front end draws none
const STYLE = "padding:4px 6px; font-size:12px; line-height:16px; white-space:pre-wrap; overflow-wrap:anywhere;";

const isOurs = (node) => node?.comfyClass?.startsWith("MedSteer_") ?? false;

function growToFit(node) {
  const [, needed] = node.computeSize();
  if (node.size[1] < needed) node.setSize([node.size[0], needed]);
  node.setDirtyCanvas(true, true);
}

function addNote(node) {
  const text = document.createElement("div");
  text.style.cssText = STYLE;
  const element = document.createElement("div");
  element.style.cssText = "overflow-y:auto; user-select:text; color:var(--input-text, #ddd);";
  element.setAttribute("data-medsteer-note", "");
  element.append(text);
  let height = FIRST_HEIGHT;
  const widget = node.addDOMWidget(NOTE, NOTE, element, {
    serialize: false,
    margin: MARGIN,
    getMinHeight: () => height + 2 * MARGIN,
    getMaxHeight: () => height + 2 * MARGIN, // what is left of the node goes to its pictures
    getValue: () => text.textContent,
  });
  widget.serialize = false;
  // The text's height changes with the text and with the node's width, and is 0 while the node is not drawn.
  const observer = new ResizeObserver(() => {
    if (!text.offsetHeight || text.offsetHeight === height) return;
    height = text.offsetHeight;
    element.style.minHeight = `${height}px`; // what Nodes 2.0 goes by
    growToFit(node);
  });
  observer.observe(text);
  const onRemove = widget.onRemove;
  widget.onRemove = function (...rest) {
    observer.disconnect();
    return onRemove?.apply(this, rest);
  };
  return widget;
}

const heights = new WeakMap(); // of somebody else's nodes, before they grew by what the pack has to say

function show(node, note) {
  if (!isOurs(node) && !heights.has(node)) heights.set(node, node.size[1]);
  const widget = node.widgets?.find((one) => one.name === NOTE) ?? addNote(node);
  widget.element.firstChild.textContent = note;
  // On somebody else's node it comes unawares and may reach over the next one's title: legible there too.
  if (!isOurs(node)) widget.element.style.background = "var(--comfy-menu-bg, #353535)";
  growToFit(node);
}

function clear(node) {
  const widget = node?.widgets?.find((one) => one.name === NOTE);
  if (!widget) return;
  node.removeWidget(widget);
  if (heights.has(node)) node.setSize([node.size[0], Math.max(heights.get(node), node.computeSize()[1])]);
  heights.delete(node);
  node.setDirtyCanvas(true, true);
}

// The node that the server names: "12", or "5:12" for one within the subgraph of node 5.
function nodeOf(id) {
  const path = String(id).split(":");
  let graph = app.rootGraph ?? app.graph;
  for (const step of path.slice(0, -1)) graph = graph?.getNodeById(Number(step))?.subgraph;
  return graph?.getNodeById(Number(path.at(-1)));
}

app.registerExtension({
  name: "medsteer.WhatARunLeaves",
  setup() {
    api.addEventListener("medsteer_note", ({ detail }) => {
      const node = nodeOf(detail.node);
      if (node) show(node, detail.text);
    });
    // What was said of the last run is no longer true of a node that runs anew, or that has failed.
    api.addEventListener("executing", ({ detail }) => {
      const node = detail == null ? null : nodeOf(detail);
      if (node && !isOurs(node)) clear(node);
    });
    api.addEventListener("execution_error", ({ detail }) => clear(nodeOf(detail.node_id)));
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("MedSteer_")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      const recipe = output?.[RECIPE]?.[0];
      if (recipe) this.properties[RECIPE] = recipe;
      const done = onExecuted?.call(this, output, ...rest);
      const note = output?.[NOTE]?.[0];
      if (note) show(this, note);
      return done;
    };
  },
});
