"""`epd demo`: a pipeline with the built-in model, a picture that is read, and where the time went.

Lives in the user's process; `plain` alone runs in a process forked from the pipeline's zygote.
"""
