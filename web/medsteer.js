// Keeps, among a vector node's properties, how its vector was made: a shared workflow says it where the file is missing.
import { app } from "../../scripts/app.js";

const PROPERTY = "medsteer_recipe";

app.registerExtension({
  name: "medsteer.VectorRecipe",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("MedSteer_")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      const recipe = output?.[PROPERTY]?.[0];
      if (recipe) this.properties[PROPERTY] = recipe;
      return onExecuted?.call(this, output, ...rest);
    };
  },
});
