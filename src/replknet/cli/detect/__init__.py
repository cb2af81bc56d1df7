"""Find objects and their outlines: FCOS and Cascade Mask R-CNN on COCO, or on one's own data in COCO's format."""

COMMANDS: dict[str, str] = {
    "train": "train a detector by a recipe, on COCO or on your own data in its format",
    "eval": "score a detector: COCO's average precision of boxes and masks",
    "predict": "find objects in pictures, folders and videos: drawings and COCO JSON",
    "check": "check an annotation file and its pictures",
    "convert": "write a checkpoint together with its config and class names, merged if asked for",
    "complexity": "count a detector's parameters and multiply-adds",
}
