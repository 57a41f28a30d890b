"""The rules that the decision core is given: whose turn it is, what is next, and who gets it. Pure; chosen by name.

`fairness` shares among tenants, `order` says which request or patch of a tenant is next, `choice` which worker gets it,
`costs` how many seconds a worker's work takes.
"""
