"""The review page: people look at a sample of images and say which they would keep.

``session.py`` knows what to show next, what was said, and what follows from it; ``app.py`` is the
web application around it, and the only user of FastAPI and uvicorn.
"""
