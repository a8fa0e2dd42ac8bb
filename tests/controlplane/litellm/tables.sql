-- The tables of a LiteLLM proxy that an import reads, as far as tests need them: names and types as its migrations make
-- them (test_real_package.py uses those themselves). A version of some time ago: columns that came later are missing.
CREATE TABLE "LiteLLM_BudgetTable" (
    budget_id text PRIMARY KEY, max_budget double precision, soft_budget double precision,
    max_parallel_requests integer, tpm_limit bigint, rpm_limit bigint, model_max_budget jsonb, budget_duration text,
    budget_reset_at timestamp(3), created_at timestamp(3) NOT NULL DEFAULT now()
);
CREATE TABLE "LiteLLM_OrganizationTable" (
    organization_id text PRIMARY KEY, organization_alias text NOT NULL, budget_id text NOT NULL,
    models text[], spend double precision NOT NULL DEFAULT 0, metadata jsonb NOT NULL DEFAULT '{}',
    created_at timestamp(3) NOT NULL DEFAULT now()
);
CREATE TABLE "LiteLLM_ModelTable" (id serial PRIMARY KEY, aliases jsonb);
CREATE TABLE "LiteLLM_TeamTable" (
    team_id text PRIMARY KEY, team_alias text, organization_id text, members_with_roles jsonb NOT NULL DEFAULT '{}',
    metadata jsonb NOT NULL DEFAULT '{}', max_budget double precision, spend double precision NOT NULL DEFAULT 0,
    models text[], max_parallel_requests integer, tpm_limit bigint, rpm_limit bigint, budget_duration text,
    blocked boolean NOT NULL DEFAULT false, model_id integer, created_at timestamp(3) NOT NULL DEFAULT now()
);
CREATE TABLE "LiteLLM_UserTable" (
    user_id text PRIMARY KEY, user_alias text, user_email text, user_role text, organization_id text,
    max_budget double precision, spend double precision NOT NULL DEFAULT 0, models text[], metadata jsonb DEFAULT '{}',
    max_parallel_requests integer, tpm_limit bigint, rpm_limit bigint, budget_duration text, created_at timestamp(3)
);
CREATE TABLE "LiteLLM_VerificationToken" (
    token text PRIMARY KEY, key_name text, key_alias text, spend double precision NOT NULL DEFAULT 0,
    expires timestamp(3), models text[], aliases jsonb NOT NULL DEFAULT '{}', config jsonb NOT NULL DEFAULT '{}',
    user_id text, team_id text, permissions jsonb NOT NULL DEFAULT '{}', max_parallel_requests integer,
    metadata jsonb NOT NULL DEFAULT '{}', blocked boolean, tpm_limit bigint, rpm_limit bigint,
    max_budget double precision, budget_duration text, allowed_routes text[] DEFAULT '{}',
    model_max_budget jsonb NOT NULL DEFAULT '{}', budget_id text, organization_id text,
    created_at timestamp(3) DEFAULT now()
);
CREATE TABLE "LiteLLM_EndUserTable" (
    user_id text PRIMARY KEY, alias text, spend double precision NOT NULL DEFAULT 0, budget_id text,
    blocked boolean NOT NULL DEFAULT false
);
CREATE TABLE "LiteLLM_SpendLogs" (request_id text PRIMARY KEY, messages jsonb);
