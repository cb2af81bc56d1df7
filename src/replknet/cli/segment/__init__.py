"""`replknet segment`: semantic segmentation with UperNet. One module a second word."""

COMMANDS: dict[str, str] = {
    "train": "train a recipe, a config of MMSegmentation, or on one's own folder",
    "eval": "mIoU of a segmentor, at one size or at six with flip",
    "predict": "overlays, label maps and JSON of pictures and folders",
    "check": "hold a data set's folders, pictures and label maps against each other",
    "prepare": "write Cityscapes' training labels",
    "complexity": "parameters and multiply-adds beside the published ones",
    "export": "export to ONNX or torch.export, checked",
}
