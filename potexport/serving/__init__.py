"""`potexport serve`: a bundle behind the chat protocol that OpenAI's clients speak.

`protocol` says what a request may ask and what an answer looks like, `engine` computes one request
at a time, `sessions` holds what conversations have read, `app` is the HTTP around it, `server` the
sockets, their time limits and the end.
"""
