"""onnxruntime-genai, 4-bit weights as its builder makes them by default."""

from potexport.peers._genai import Genai

PEER = Genai("int4")
