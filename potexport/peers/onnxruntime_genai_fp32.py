"""onnxruntime-genai, weights as they are."""

from potexport.peers._genai import Genai

PEER = Genai("fp32")
