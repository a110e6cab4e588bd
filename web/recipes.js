// A node's recipe: one choice that sets several widgets, by a table that the node's schema brings. A widget that is changed
// afterwards makes the choice read "custom", or the recipe that the widgets have become.
import { app } from "../../scripts/app.js";

const RECIPE = "recipe";
const TABLE = "medsteer_recipes";
const CUSTOM = "custom";

function same(one, other) {
  return typeof one === "number" && typeof other === "number" ? Math.abs(one - other) < 1e-6 : one === other;
}

function named(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

// Whether another node gives the widget's value, so that the widget itself says nothing.
function isLinked(node, name) {
  return node.inputs?.some((input) => input.widget?.name === name && input.link != null) ?? false;
}

function recognised(node, table) {
  const fits = ([name, value]) => same(named(node, name)?.value, value) && !isLinked(node, name);
  const found = Object.entries(table).find(([, values]) => Object.entries(values).every(fits));
  return found ? found[0] : CUSTOM;
}

function extend(node, table) {
  const names = new Set(Object.values(table).flatMap(Object.keys));
  const watched = new WeakSet();
  let setting = false;

  function recognise() {
    const widget = named(node, RECIPE);
    const found = recognised(node, table);
    if (setting || !widget || widget.value === found) return;
    widget.value = found;
    node.setDirtyCanvas(true, true);
  }

  function choose(recipe) {
    if (setting || !table[recipe]) return recognise();
    setting = true;
    try {
      for (const [name, value] of Object.entries(table[recipe])) {
        const widget = named(node, name);
        if (!widget || same(widget.value, value)) continue;
        widget.value = value;
        widget.callback?.(value, app.canvas, node);
      }
    } finally {
      setting = false;
    }
    watch(); // another operator brought other widgets
    recognise();
    node.setDirtyCanvas(true, true);
  }

  function watch() {
    for (const widget of node.widgets ?? []) {
      const isChoice = widget.name === RECIPE;
      if (watched.has(widget) || !(isChoice || names.has(widget.name))) continue;
      watched.add(widget);
      const callback = widget.callback;
      widget.callback = function (value, ...rest) {
        const done = callback?.call(this, value, ...rest);
        if (isChoice) choose(value);
        else {
          watch();
          recognise();
        }
        return done;
      };
    }
  }

  watch();
  recognise();
  for (const event of ["onConfigure", "onConnectionsChange"]) {
    const before = node[event];
    node[event] = function (...rest) {
      const done = before?.apply(this, rest);
      watch();
      recognise();
      return done;
    };
  }
}

app.registerExtension({
  name: "medsteer.Recipes",
  nodeCreated(node) {
    const inputs = node.constructor.nodeData?.input?.optional;
    const table = inputs?.[RECIPE]?.[1]?.[TABLE];
    if (table) extend(node, table);
  },
});
