"""The command line: parses arguments, calls the library, prints results.

The file of a verb has the verb's name; `synthesis` holds vocode, resynth and mel. Verbs import
torch when the work begins, so that help and errors come at once.
"""
