# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program REMOTE: of libvirt's own procedures those that we speak.

Source: libvirt's remote_protocol.x; a test compares every row with what it says.
"""

from virtbackup.remote import program
from virtbackup.remote import remote_structs as structs
from virtbackup.remote.program import Proc, event

REMOTE = program.Program(
    "REMOTE",
    0x20008086,
    1,
    (
        Proc(1, "CONNECT_OPEN", structs.ConnectOpenArgs),
        Proc(2, "CONNECT_CLOSE"),
        Proc(3, "CONNECT_GET_TYPE", None, structs.TypeRet),
        Proc(4, "CONNECT_GET_VERSION", None, structs.ConnectGetVersionRet),
        Proc(6, "NODE_GET_INFO", None, structs.NodeGetInfoRet),
        Proc(7, "CONNECT_GET_CAPABILITIES", None, structs.ConnectGetCapabilitiesRet),
        Proc(14, "DOMAIN_GET_XML_DESC", structs.DomainFlagsArgs, structs.XmlRet),
        Proc(15, "DOMAIN_GET_AUTOSTART", structs.DomainArgs, structs.DomainGetAutostartRet),
        Proc(16, "DOMAIN_GET_INFO", structs.DomainArgs, structs.DomainGetInfoRet),
        Proc(19, "DOMAIN_GET_OS_TYPE", structs.DomainArgs, structs.TypeRet),
        Proc(
            21,
            "CONNECT_LIST_DEFINED_DOMAINS",
            structs.ConnectListDefinedDomainsArgs,
            structs.ConnectListDefinedDomainsRet,
        ),
        Proc(22, "DOMAIN_LOOKUP_BY_ID", structs.DomainLookupByIdArgs, structs.DomainRet),
        Proc(23, "DOMAIN_LOOKUP_BY_NAME", structs.DomainLookupByNameArgs, structs.DomainRet),
        Proc(24, "DOMAIN_LOOKUP_BY_UUID", structs.DomainLookupByUuidArgs, structs.DomainRet),
        Proc(25, "CONNECT_NUM_OF_DEFINED_DOMAINS", None, structs.NumRet),
        Proc(28, "DOMAIN_RESUME", structs.DomainArgs),
        Proc(34, "DOMAIN_SUSPEND", structs.DomainArgs),
        Proc(
            37,
            "CONNECT_LIST_DOMAINS",
            structs.ConnectListDomainsArgs,
            structs.ConnectListDomainsRet,
        ),
        Proc(51, "CONNECT_NUM_OF_DOMAINS", None, structs.NumRet),
        Proc(59, "CONNECT_GET_HOSTNAME", None, structs.ConnectGetHostnameRet),
        Proc(
            60,
            "CONNECT_SUPPORTS_FEATURE",
            structs.ConnectSupportsFeatureArgs,
            structs.ConnectSupportsFeatureRet,
        ),
        Proc(66, "AUTH_LIST", None, structs.AuthListRet),
        Proc(67, "AUTH_SASL_INIT", None, structs.AuthSaslInitRet),
        Proc(68, "AUTH_SASL_START", structs.AuthSaslStartArgs, structs.AuthSaslRet),
        Proc(69, "AUTH_SASL_STEP", structs.AuthSaslStepArgs, structs.AuthSaslRet),
        Proc(70, "AUTH_POLKIT", None, structs.AuthPolkitRet),
        Proc(110, "CONNECT_GET_URI", None, structs.ConnectGetUriRet),
        Proc(
            121, "DOMAIN_GET_SECURITY_LABEL", structs.DomainArgs, structs.DomainGetSecurityLabelRet
        ),
        Proc(122, "NODE_GET_SECURITY_MODEL", None, structs.NodeGetSecurityModelRet),
        Proc(150, "DOMAIN_IS_ACTIVE", structs.DomainArgs, structs.DomainIsActiveRet),
        Proc(151, "DOMAIN_IS_PERSISTENT", structs.DomainArgs, structs.DomainIsPersistentRet),
        Proc(157, "CONNECT_GET_LIB_VERSION", None, structs.ConnectGetLibVersionRet),
        Proc(163, "DOMAIN_GET_JOB_INFO", structs.DomainArgs, structs.DomainGetJobInfoRet),
        Proc(164, "DOMAIN_ABORT_JOB", structs.DomainArgs),
        Proc(
            183,
            "DOMAIN_HAS_MANAGED_SAVE_IMAGE",
            structs.DomainFlagsArgs,
            structs.DomainHasManagedSaveImageRet,
        ),
        Proc(187, "DOMAIN_SNAPSHOT_NUM", structs.DomainFlagsArgs, structs.NumRet),
        Proc(
            194, "DOMAIN_GET_BLOCK_INFO", structs.DomainPathFlagsArgs, structs.DomainGetBlockInfoRet
        ),
        Proc(212, "DOMAIN_GET_STATE", structs.DomainFlagsArgs, structs.DomainGetStateRet),
        Proc(
            238,
            "DOMAIN_GET_BLOCK_JOB_INFO",
            structs.DomainPathFlagsArgs,
            structs.DomainGetBlockJobInfoRet,
        ),
        Proc(
            243,
            "DOMAIN_BLOCK_STATS_FLAGS",
            structs.DomainBlockStatsFlagsArgs,
            structs.DomainBlockStatsFlagsRet,
        ),
        Proc(
            273,
            "CONNECT_LIST_ALL_DOMAINS",
            structs.ConnectListAllDomainsArgs,
            structs.ConnectListAllDomainsRet,
        ),
        Proc(298, "DOMAIN_GET_JOB_STATS", structs.DomainFlagsArgs, structs.DomainGetJobStatsRet),
        Proc(
            316,
            "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY",
            structs.ConnectDomainEventCallbackRegisterAnyArgs,
            structs.CallbackIdRet,
        ),
        Proc(317, "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY", structs.CallbackIdArgs),
        event(318, "DOMAIN_EVENT_CALLBACK_LIFECYCLE", structs.DomainEventCallbackLifecycleMsg),
        event(326, "DOMAIN_EVENT_CALLBACK_BLOCK_JOB", structs.DomainEventCallbackBlockJobMsg),
        Proc(335, "DOMAIN_FSFREEZE", structs.DomainFsfreezeArgs, structs.DomainFsfreezeRet),
        Proc(336, "DOMAIN_FSTHAW", structs.DomainFsfreezeArgs, structs.DomainFsfreezeRet),
        event(339, "DOMAIN_EVENT_BLOCK_JOB_2", structs.DomainEventBlockJob2Msg),
        Proc(
            344,
            "CONNECT_GET_ALL_DOMAIN_STATS",
            structs.ConnectGetAllDomainStatsArgs,
            structs.ConnectGetAllDomainStatsRet,
        ),
        Proc(350, "DOMAIN_DEFINE_XML_FLAGS", structs.DomainDefineXmlFlagsArgs, structs.DomainRet),
        Proc(360, "CONNECT_REGISTER_CLOSE_CALLBACK"),
        Proc(361, "CONNECT_UNREGISTER_CLOSE_CALLBACK"),
        event(362, "CONNECT_EVENT_CONNECTION_CLOSED", structs.ConnectEventConnectionClosedMsg),
        event(
            363, "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED", structs.DomainEventCallbackJobCompletedMsg
        ),
        Proc(
            391,
            "STORAGE_POOL_LOOKUP_BY_TARGET_PATH",
            structs.StoragePoolLookupByTargetPathArgs,
            structs.StoragePoolLookupByTargetPathRet,
        ),
        Proc(
            411,
            "DOMAIN_CHECKPOINT_CREATE_XML",
            structs.DomainCheckpointCreateXmlArgs,
            structs.CheckpointRet,
        ),
        Proc(412, "DOMAIN_CHECKPOINT_GET_XML_DESC", structs.CheckpointFlagsArgs, structs.XmlRet),
        Proc(
            413,
            "DOMAIN_LIST_ALL_CHECKPOINTS",
            structs.DomainListAllCheckpointsArgs,
            structs.CheckpointsRet,
        ),
        Proc(
            414,
            "DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN",
            structs.DomainCheckpointListAllChildrenArgs,
            structs.CheckpointsRet,
        ),
        Proc(
            415,
            "DOMAIN_CHECKPOINT_LOOKUP_BY_NAME",
            structs.DomainCheckpointLookupByNameArgs,
            structs.CheckpointRet,
        ),
        Proc(
            416,
            "DOMAIN_CHECKPOINT_GET_PARENT",
            structs.CheckpointFlagsArgs,
            structs.DomainCheckpointGetParentRet,
        ),
        Proc(417, "DOMAIN_CHECKPOINT_DELETE", structs.CheckpointFlagsArgs),
        Proc(421, "DOMAIN_BACKUP_BEGIN", structs.DomainBackupBeginArgs),
        Proc(422, "DOMAIN_BACKUP_GET_XML_DESC", structs.DomainFlagsArgs, structs.XmlRet),
        Proc(426, "DOMAIN_GET_MESSAGES", structs.DomainFlagsArgs, structs.DomainGetMessagesRet),
        Proc(442, "DOMAIN_ABORT_JOB_FLAGS", structs.DomainFlagsArgs),
        Proc(443, "DOMAIN_FD_ASSOCIATE", structs.DomainFdAssociateArgs),
        Proc(449, "DOMAIN_GET_AUTOSTART_ONCE", structs.DomainArgs, structs.DomainGetAutostartRet),
    ),
)
