"""A trained model in the forms that others load: safetensors, ONNX, timm, the published layout."""
