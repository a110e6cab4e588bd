"""The node that keeps counterfactual pairs as a dataset."""

from __future__ import annotations

from comfy_api.latest import io

from ..medsteer_core.dataset.pair_dataset import BOXES, NO_BOXES, PairDataset
from ..medsteer_core.dataset.records import ARMS, BY_CLASSES, COUNTERFACTUAL, FINDING_IN, label_problem
from ..medsteer_core.dataset.splits import AUTO, CHOICES, split_problem
from ..medsteer_core.host.canvas.notes import note
from ..medsteer_core.host.folders import judges as judge_folder
from ..medsteer_core.host.folders import pairs as pair_folder
from .prompts import mask_of_sampler
from .types import CATEGORY, Record


class SaveCounterfactualPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MedSteer_SaveCounterfactualPairs",
            display_name="Save Counterfactual Pairs",
            category=f"{CATEGORY}/dataset",
            description="Adds pairs to a dataset folder: images, masks, labels, splits, and how each pair was made.",
            search_aliases=["export", "training data", "imagefolder", "hugging face", "coco", "yolo", "medsteer"],
            inputs=[
                io.Image.Input("factual", tooltip="The unsteered images, decoded."),
                io.Image.Input(
                    "counterfactual",
                    tooltip="The steered images, decoded; with several strengths, all of the first come first.",
                ),
                Record.Input("record", tooltip="From the Counterfactual Sampler that made both."),
                io.String.Input(
                    "folder",
                    default="medsteer/pairs",
                    tooltip="A folder inside ComfyUI's output folder. Pairs are added to those that it has.",
                ),
                io.String.Input(
                    "source_class",
                    default="polyps",
                    tooltip="What the factual images should show, as label. A judge wants one of its own classes.",
                ),
                io.String.Input(
                    "target_class",
                    default="normal cecum",
                    tooltip="What the counterfactual images should show, as label.",
                ),
                io.Combo.Input(
                    "split",
                    options=list(CHOICES),
                    default=AUTO,
                    tooltip=(
                        "Which part of the dataset the pairs are for. auto: by the noise, so that no two parts share "
                        "any. What made the vector is for train only."
                    ),
                ),
                io.Combo.Input(
                    "judge",
                    options=judge_folder.names(),
                    default=judge_folder.EMBEDDED,
                    tooltip=(
                        "Labels, scores and marks the finding. EndoPhantom: its own judge, which knows its drawings "
                        "only. none: nobody does. Others are in models/medsteer/judges."
                    ),
                ),
                io.Combo.Input(
                    "boxes",
                    options=list(BOXES),
                    default=NO_BOXES,
                    tooltip="Also writes the finding's boxes, for detectors: COCO's JSON, YOLO's text files, or both.",
                ),
                io.Combo.Input(
                    "metadata",
                    options=list(pair_folder.METADATA),
                    default=pair_folder.WORKFLOW,
                    tooltip=(
                        "What the PNGs say beside that they are synthetic. Workflow and record both hold the prompts; "
                        "choose marking only if those are private."
                    ),
                ),
                io.Combo.Input(
                    "arm",
                    options=list(ARMS),
                    default=COUNTERFACTUAL,
                    advanced=True,
                    tooltip="What the pairs are for: the effect, or a control. Strength 0 is noticed by itself.",
                ),
                io.Combo.Input(
                    "finding_in",
                    options=list(FINDING_IN),
                    default=BY_CLASSES,
                    advanced=True,
                    tooltip="Which image shows the finding, for boxes of a connected mask. auto: as the classes say.",
                ),
                io.Float.Input(
                    "validation_fraction",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="The share of noises for validation, with split auto. Keep it for the whole folder.",
                ),
                io.Float.Input(
                    "test_fraction",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="The share of noises for test, with split auto. Keep it for the whole folder.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Marks the finding: Counterfactual Sampler's concept_map or mask, or one of your own. Without "
                        "it the judge's segmenter marks it."
                    ),
                ),
            ],
            outputs=[
                io.String.Output("folder", tooltip="The folder's name in the output folder."),
                io.String.Output("summary", tooltip="How many pairs were saved, and how many each split has."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls,
        folder: str | None,
        judge: str | None,
        source_class: str | None,
        target_class: str | None,
        split: str | None = None,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
    ) -> bool | str:
        # None: linked to another node, so not known yet
        problems = [
            "" if folder is None else pair_folder.problem(folder),
            "" if source_class is None else label_problem(source_class, "source_class"),
            "" if target_class is None else label_problem(target_class, "target_class"),
            judge_folder.class_problem(judge, source_class, target_class),
            split_problem(AUTO if split is None else split, validation_fraction or 0.0, test_fraction or 0.0),
        ]
        return next(filter(None, problems), True)

    @classmethod
    def fingerprint_inputs(cls, judge: str | None = None, **_) -> str:
        return "" if judge is None else judge_folder.state(judge)

    @classmethod
    def execute(
        cls,
        factual,
        counterfactual,
        record,
        folder,
        source_class,
        target_class,
        split,
        judge,
        boxes,
        metadata,
        arm,
        finding_in,
        validation_fraction,
        test_fraction,
        mask=None,
    ) -> io.NodeOutput:
        hidden = cls.hidden
        from ..medsteer_core.dataset.saving import SaveRequest, save_pairs  # judges wait until a pair is saved

        request = SaveRequest(
            factual=factual,
            counterfactual=counterfactual,
            records=record,
            source=source_class,
            target=target_class,
            split=split,
            validation=validation_fraction,
            test=test_fraction,
            judge=judge_folder.judge_of(judge),
            mask=mask,
            mask_source=mask_of_sampler(hidden.prompt, hidden.unique_id, "mask", record),
            finding_in=finding_in,
            boxes=boxes,
            arm=arm,
            texts=pair_folder.png_texts(metadata, hidden.prompt, hidden.extra_pnginfo),
            with_record=pair_folder.with_record(metadata),
        )
        saved = save_pairs(PairDataset(pair_folder.folder_of(folder)), request)
        text = saved.in_words(folder)
        shown = {
            **note(text).as_dict(),
            "images": pair_folder.shown_files(folder, saved.records),
            "medsteer_pairs": saved.records,
        }
        return io.NodeOutput(folder, text, ui=shown)
