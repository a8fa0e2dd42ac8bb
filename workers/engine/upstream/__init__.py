"""An engine that is somebody else's: an OpenAI-compatible endpoint, called over HTTP for each request.

engine.py is the Engine; http.py the connections, sse.py and answer.py what comes back, ask.py what is sent, breaker.py
when it is left alone, counting.py tokens of which nobody here has ids.
"""
