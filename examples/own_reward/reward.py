"""A reward function: how well a box fits."""

import re


def box_reward(question, response, parsed, metadata):
    """Reward a box by its intersection over union; from 0.5 on it is right."""
    box = [int(digit) for digit in re.findall(r"\d", parsed or "")]
    if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
        return {"accuracy": (0, 0), "iou": 0}
    left, top, right, bottom = metadata["box"]
    width = max(0, min(box[2], right) - max(box[0], left))
    height = max(0, min(box[3], bottom) - max(box[1], top))
    areas = (right - left) * (bottom - top) + (box[2] - box[0]) * (box[3] - box[1])
    iou = width * height / (areas - width * height)
    return {"accuracy": (float(iou >= 0.5), 0), "iou": iou}
