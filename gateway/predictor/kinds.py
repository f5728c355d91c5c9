"""The canonical kind of a tool, over all clients' names for it."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

KINDS: Final = (
    "shell",
    "poll",
    "read",
    "edit",
    "search",
    "plan",
    "subagent",
    "message",
    "web",
    "human",
    "background",
    "mcp",
    "other",
)
"""All kinds; the only values a label or a column can take."""

_NAMES: Final[dict[str, str]] = {
    "shell": "bash exec exec_command execute_bash execute_command powershell pwsh run_command"
    " run_commands run_in_terminal run_shell_command run_terminal_cmd shell shell_command"
    " developer__shell terminal local_shell local_shell_call python ipython execute_ipython_cell",
    "poll": "write_stdin wait wait_agent task_output TaskOutput BashOutput bash_output read_bash"
    " read_background_output CheckBackgroundJob check_background_job team_await_runs"
    " AgentOutputTool get_terminal_output sleep list_agents",
    "read": "read read_file read_files view view_image cat open_file NotebookRead list list_dir"
    " list_directory ls LS tree read_many_files list_mcp_resources read_mcp_resource"
    " ReadMcpResourceTool ListMcpResourcesTool read_currently_open_file view_repo_map",
    "edit": "edit multi_edit MultiEdit write write_file write_to_file apply_patch apply_diff"
    " str_replace_editor str_replace str_replace_based_edit_tool file_editor editor replace patch"
    " insert create create_file create_new_file edit_existing_file search_and_replace NotebookEdit"
    " notebook_edit insert_content developer__text_editor single_find_and_replace",
    "search": "grep glob grep_search glob_search search_files search_file_content codebase_search"
    " code_search file_search find lsp LSP list_code_definition_names tool_search ToolSearch",
    "plan": "TodoWrite TodoRead todo_write todo_read update_plan update_todo_list TaskCreate"
    " TaskUpdate TaskList TaskGet task_create task_update think skill Skill EnterPlanMode"
    " enter_plan_mode EnterWorktree ExitWorktree ReportFindings save_memory memory task_tracker"
    " SlashCommand write_todos get_goal update_goal create_goal",
    "subagent": "agent task Agent Task delegate invoke_agent new_task spawn_agent spawn_subagent"
    " Workflow workflow run_subagent",
    "message": "send_message SendMessage send_input followup_task resume_agent close_agent"
    " interrupt_agent TaskStop KillShell KillBash stop_bash kill_shell team_send",
    "web": "WebFetch webfetch WebSearch web_fetch web_search fetch Fetch fetch_web_content"
    " google_web_search browser_action url_fetch browser browse fetch_url_content",
    "human": "AskQuestion AskUserQuestion ExitPlanMode ask_followup_question ask_question ask_user"
    " ask_user_question attempt_completion exit_plan_mode finish plan_mode_respond question"
    " request_user_input submit",
    "background": "CronCreate Monitor ScheduleWakeup loop_wakeup monitor CronDelete CronList",
}


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


_KIND_OF: Final = {_plain(name): kind for kind, names in _NAMES.items() for name in names.split()}


def is_well_known(name: str) -> bool:
    """Whether a tool of some client has this very name."""
    return _plain(name) in _KIND_OF


@lru_cache(maxsize=1024)
def _kind_of(name: str) -> str:
    found = _KIND_OF.get(_plain(name))
    if found is not None:
        return found
    if name.startswith(("mcp__", "mcp_", "mcp.")):
        return "mcp"
    last = _plain(name.replace(".", "/").rpartition("/")[2])
    return _KIND_OF.get(last, "other")


def kind_of(name: str) -> str:
    """The kind of a tool, one of `KINDS`; ``other`` where nothing is known of it."""
    return _kind_of(name[:64])
