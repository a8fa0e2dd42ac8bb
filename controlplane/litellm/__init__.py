"""Moving from a LiteLLM proxy: read its tables and configuration (source, proxyconfig), plan what becomes of them
(plan and the modules it calls: pure), carry that out in one transaction (carry). Called by `manage.py import_litellm`.
"""
